"""Checkpoints that appear whole or not at all: their files, manifests and names.

A checkpoint is written below ``_saving``, listed with sizes and checksums in its ``manifest.json``, flushed to the
disk and only then renamed to ``checkpoint-N``. ``resume`` has the trainer's side.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..errors import ConfigError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Not "checkpoint-*", which trainers look for; a leading "_" is what the host does not upload.
STAGING, TRASH = "_saving", "_deleting"
CHUNK_BYTES = 2**22


def check_writable(output_dir: str | Path) -> None:
    """Create a folder where it is missing, and try to write a file there.

    Raises:
        ConfigError: neither is possible.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"output_dir must be a folder that can be written to, got {str(output_dir)!r} ({error.strerror or error})."
        ) from error


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Write a folder's ``manifest.json``, and flush all to the disk.

    It holds the time, ``saved``, and ``files``: relative name -> [bytes, CRC-32].
    """
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(_checksum, files))
        sizes = [path.stat().st_size for path in files]
        names = [path.relative_to(folder).as_posix() for path in files]
        entries = dict(zip(names, zip(sizes, checksums, strict=True), strict=True))
        manifest.write_text(json.dumps({"saved": time.time(), "files": entries}, indent=1))
        list(pool.map(_flush, [*paths, manifest, folder, folder.parent]))


def _read_manifest(folder: Path) -> tuple[float, dict[str, tuple[int, int]]]:
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {name: (int(size), int(checksum)) for name, (size, checksum) in manifest["files"].items()}
    return float(manifest["saved"]), files


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, in a few words; None if nothing is."""
    try:
        expected = _read_manifest(folder)[1]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    try:
        for name, (size, _) in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
        with ThreadPoolExecutor() as pool:
            checksums = pool.map(_checksum, [folder / name for name in expected])
            for (name, (_, checksum)), found in zip(expected.items(), checksums, strict=True):
                if found != checksum:
                    return f"the checksum of {name} is {found} instead of {checksum}"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return None


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The ``checkpoint-N`` that was saved last and agrees with its manifest; a warning names each newer one.

    By time and not by step: a run that went on from an earlier checkpoint leaves later steps of another run behind.
    Those without a readable manifest are looked at first, from the highest step on.
    """

    def age(item: tuple[int, Path]) -> tuple[float, int]:
        try:
            return _read_manifest(item[1])[0], item[0]
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return math.inf, item[0]

    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {int(step): path for path in folders if (step := path.name.partition("-")[2]).isdecimal()}
    for _, path in sorted(steps.items(), key=age, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("The checkpoint %s is skipped: %s.", path, damage)
    return None


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint into the trash; returns where it is then."""
    trash = folder.parent / TRASH
    shutil.rmtree(trash, ignore_errors=True)
    trash.mkdir(exist_ok=True)  # files that others hold open can survive on a network file system
    aside = trash / folder.name
    if aside.exists():
        aside = Path(tempfile.mkdtemp(dir=trash)) / folder.name
    os.replace(folder, aside)
    return aside


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that none is ever seen half deleted."""
    _set_aside(folder)
    shutil.rmtree(folder.parent / TRASH, ignore_errors=True)


def appear(staged: Path, final: Path) -> None:
    """Give a complete staged checkpoint its name; one that had it before is set aside, and comes back on failure."""
    old = _set_aside(final) if final.exists() else None
    try:
        os.replace(staged, final)
    except BaseException:
        if old is not None:
            os.replace(old, final)
        raise
    _flush(final.parent)
    for name in (TRASH, STAGING):
        shutil.rmtree(final.parent / name, ignore_errors=True)


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed run was saving or deleting; a checkpoint that lacked only its final name gets it."""
    output_dir = Path(output_dir)
    for staged in (output_dir / STAGING).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if find_damage(staged) is None:
            appear(staged, output_dir / staged.name)
    for name in (STAGING, TRASH):
        shutil.rmtree(output_dir / name, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beside ``newest``, so that at most ``limit`` are left.

    Args:
        newest: kept in any case.
        limit: how many; None or below 1 for all.
        best: another folder that is kept, as the host has recorded it.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest} if best is None else {newest, Path(best)}
    others = [path for path in map(Path, sort_checkpoints(str(newest.parent), use_mtime=True)) if path not in kept]
    for path in others[: max(len(others) + len(kept) - max(limit, len(kept)), 0)]:
        try:
            discard(path)
        except OSError as error:
            logger.warning("The old checkpoint %s could not be deleted: %s.", path, error)
