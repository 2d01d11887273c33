"""Whether vgs installs beside each host that docs/hosts.md names: pip resolves both together, and installs nothing.

python tests/hosts/resolve.py [HOST ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Host:
    """What is resolved together.

    Attributes:
        requirements: of the host, with the pins of its own extras for training.
        extra: of vgs; "" for the losses alone.
        shown: packages whose chosen versions are printed.
    """

    requirements: tuple[str, ...]
    extra: str
    shown: tuple[str, ...] = ("torch", "transformers", "trl", "peft")


HOSTS = {
    "verl": Host(("verl==0.9.1", "transformers==5.9.0"), "core"),
    "swift": Host(("ms-swift==4.6.0",), "core"),
    "axolotl": Host(("axolotl==0.19.0",), "core"),
    "llamafactory": Host(("llamafactory==0.9.5",), ""),
}


def resolve(python: Path, host: Host) -> dict[str, str]:
    """The versions that pip chooses.

    Args:
        python: of a bare environment.
        host: what to resolve.

    Raises:
        RuntimeError: pip's words, where nothing fits.
    """
    own = f"{ROOT}[{host.extra}]" if host.extra else str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--quiet", "--disable-pip-version-check", "--report", str(report)]
        command = [str(python), "-m", "pip", "install", *options, own, *host.requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "WARNING: Location" not in line]
            raise RuntimeError("\n".join(lines[-30:]))
        chosen = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in chosen}


def main(names: list[str]) -> int:
    """1 where a host does not fit any more."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        for name in names or HOSTS:
            host = HOSTS[name]
            try:
                versions = resolve(Path(folder) / "bin" / "python", host)
            except RuntimeError as error:
                failed.append(name)
                print(
                    f"{name}: vgs[{host.extra}] does not install beside {', '.join(host.requirements)}:\n{error}",
                    flush=True,
                )
                continue
            found = ", ".join(f"{package} {versions[package]}" for package in host.shown if package in versions)
            print(f"{name}: fits, {found}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
