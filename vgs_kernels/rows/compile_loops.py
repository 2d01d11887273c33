"""loops.c as a library of this machine: compiled when it is first needed, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("loops.c")
#: No OpenMP library is needed: its ``simd`` is a matter of the compiler alone.
_FLAGS = ["-O3", "-fno-fast-math", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_FLAGS += ["-shared", "-fPIC"]
#: For this very processor, in the words of GCC and of Clang on ARM; the last choice is any of its kind.
_PROCESSOR_FLAGS = (["-march=native"], ["-mcpu=native"], [])


class CannotCompile(RuntimeError):
    """Why there are no loops, in a few words."""


def library() -> ctypes.CDLL:
    """The compiled loops. The first call of a process looks for them; where there are none, the first of a machine
    compiles them.

    Raises:
        CannotCompile: there is no compiler, or it cannot, or nobody can write what it makes.
    """
    found = _found()
    if isinstance(found, str):
        raise CannotCompile(found)
    return found


@functools.cache
def _found() -> ctypes.CDLL | str:
    """The library, or why there is none; asked once."""
    try:
        return _load()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)


def _load() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        raise RuntimeError("no C compiler found")
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    described = [_SOURCE.read_text(), *compiler, version, *_FLAGS, _processor()]
    name = f"loops-{hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:16]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "vgs_kernels"
    try:
        if not folder.is_absolute():
            raise OSError("no absolute path")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _ours_alone(folder):
            raise OSError("somebody else may write there")
        with contextlib.suppress(OSError):  # not there, or torn
            if _ours_alone(folder / name):
                return ctypes.CDLL(str(folder / name))
        return _built(compiler, name, folder)
    except OSError:  # nobody may write there, or run what is written, or others may
        return _built(compiler, name, None)


def _ours_alone(path: Path) -> bool:
    """Whether this user owns a file or folder, and nobody else may write to it: what is loaded from there is run."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _built(compiler: list[str], name: str, folder: Path | None) -> ctypes.CDLL:
    """Compile in a folder of one's own below ``folder``, and keep the library there, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="vgs-kernels-", dir=folder, ignore_cleanup_errors=True) as scratch:
        built = Path(scratch) / name
        for flags in _PROCESSOR_FLAGS:
            command = [*compiler, *_FLAGS, *flags, "-o", str(built), str(_SOURCE), "-lm"]
            made = subprocess.run(command, check=flags == [], capture_output=True, text=True)
            if made.returncode == 0:
                break
        found = ctypes.CDLL(str(built))
        if folder is not None:
            built.replace(folder / name)
    return found


def _processor() -> str:
    """What code for this processor depends on: homes may be shared by machines."""
    found = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        told = ("flags", "Features", "features", "model name", "cpu\t", "isa", "uarch")
        found += sorted({x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(told)})
    return "\n".join(found)
