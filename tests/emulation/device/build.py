"""Builds the stand-ins for CUDA's libraries, and starts Python with them under a CUDA build of PyTorch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def _packages() -> Path:
    """Where packages are installed."""
    return Path(importlib.util.find_spec("torch").origin).parents[1]


def _headers() -> list[Path]:
    """Folders of CUDA's headers: the wheel of the runtime, and Triton's, which has those that it leaves out."""
    places = [*_packages().glob("nvidia/cu*/include"), _packages() / "triton/backends/nvidia/include"]
    return [place for place in places if place.is_dir()]


def missing() -> str | None:
    """Why the stand-ins cannot be used here, or None."""
    if shutil.which("gcc") is None:
        return "there is no gcc"
    if not list(_packages().glob("nvidia/cu*/include/cuda_runtime_api.h")):
        return "PyTorch is no CUDA build, or its packages have no headers"
    return None


def build(folder: Path) -> dict[str, str]:
    """Compile the stand-ins into ``folder``; returns the environment in which Python finds them.

    Raises:
        RuntimeError: where they do not compile, with what gcc says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{place}" for place in _headers()]
    runtime, driver = folder / "emulated_cuda.so", folder / "libcuda.so.1"
    for output, sources, options in (
        (runtime, ("runtime.c", "blas.c"), ("-lpthread", "-ldl")),
        (driver, ("driver.c",), ("-Wl,-soname,libcuda.so.1",)),
    ):
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *include, "-o", str(output)]
        command += [*(str(FOLDER / source) for source in sources), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
    return {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder)}


def environment(folder: Path) -> dict[str, str]:
    """This process's environment, with the stand-ins, and without Triton's interpreter."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests/support"), inherited.get("PYTHONPATH", "")]
    return {**inherited, **build(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(f"The CUDA path cannot be emulated: {reason}.")
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment(ROOT / "runs/emulation"))
