"""Whether vgs installs beside each host that docs/hosts.md names, as that page says: uv resolves both together.

Nothing is installed but uv itself, in an environment that is gone afterwards. What the page says of the larger extra,
which does not fit, is looked at too: where it fits one day, the page is wrong.

python tests/hosts/resolve.py [HOST ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = "uv==0.13.9"
SECONDS = 300.0  # for one resolution, which takes some ten
SHOWN = ("torch", "transformers", "trl", "peft")
NOT_RESOLVED = "No solution found when resolving dependencies"


@dataclass(frozen=True)
class Host:
    """What is resolved together.

    Attributes:
        requirement: of the host, which brings its own pins.
        fits: extra of vgs that installs beside it; "" for the losses alone.
        too_much: extra that does not.
    """

    requirement: str
    fits: str = "core"
    too_much: str = "train"

    def own(self, extra: str) -> str:
        """The requirement of this checkout with an extra."""
        return f"vgs-kernels{f'[{extra}]' if extra else ''}"


HOSTS = {
    "verl": Host("verl==0.9.1"),
    "swift": Host("ms-swift==4.6.0"),
    "axolotl": Host("axolotl==0.19.0"),
    "llamafactory": Host("llamafactory==0.9.5", "", "core"),
}


class NotKnown(RuntimeError):
    """The resolution did not end, or ended by something else than requirements that exclude each other."""


def resolve(python: Path, own: str, requirement: str) -> tuple[dict[str, str], str]:
    """The versions that are chosen, or why there are none.

    Args:
        python: of an environment that has uv.
        own: of this checkout.
        requirement: of the host.

    Returns:
        Name -> version, empty where nothing fits; and uv's words, empty where something does.

    Raises:
        NotKnown: no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "wanted.in", Path(folder) / "found.txt"
        wanted.write_text(f"{own} @ {ROOT.as_uri()}\n{requirement}\n")
        command = [str(python), "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        try:
            done = subprocess.run(
                [*command, "--python", sys.executable, "--output-file", str(found), str(wanted)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise NotKnown(f"uv has not answered within {SECONDS:.0f} s") from error
        if done.returncode and NOT_RESOLVED in done.stderr:
            return {}, done.stderr.strip()
        if done.returncode:
            raise NotKnown(done.stderr.strip())
        pairs = [line.split("==", 1) for line in found.read_text().splitlines() if "==" in line]
        return {name: version.split(" ")[0] for name, version in pairs}, ""


def problems(python: Path, host: Host) -> list[str]:
    """What differs from the page; prints what was found.

    Args:
        python: of an environment that has uv.
        host: what to resolve.
    """
    found = []
    for extra, expected in ((host.fits, True), (host.too_much, False)):
        pair, start = f"{host.own(extra)} beside {host.requirement}", time.monotonic()
        try:
            versions, words = resolve(python, host.own(extra), host.requirement)
        except NotKnown as error:
            print(f"{pair}: not known: {error}", flush=True)
            found.append(f"{pair}: not known")
            continue
        seconds = f"{time.monotonic() - start:.0f} s"
        shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
        print(f"{pair}: {f'fits, {shown}' if versions else 'does not fit'} ({seconds})", flush=True)
        if bool(versions) != expected:
            found.append(f"{pair}: docs/hosts.md says that it {'fits' if expected else 'does not'}")
            print(words, flush=True)
    return found


def main(names: list[str]) -> int:
    """1 where something is not as docs/hosts.md says, or not known."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", UV], check=True)
        for name in names or HOSTS:
            found += problems(python, HOSTS[name])
    print("\n".join(found) or f"All as docs/hosts.md says, of {', '.join(names or HOSTS)}.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
