"""Tables of rows from files, folders and the hub, through ``datasets``; pictures in them stay undecoded."""

from __future__ import annotations

import bz2
import csv
import gzip
import logging
import lzma
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns, resolve_pattern
from huggingface_hub import DatasetCard, constants

from ..errors import ConfigError
from .images import Folders

logger = logging.getLogger(__name__)

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".arrow": "arrow"}
FORMATS |= {".ndjson": "jsonl"}
BUILDERS = {"jsonl": "json", "tsv": "csv"}  # where they are not called like the format
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))  # of a folder of pictures
BOOKKEEPING = {*FILES_TO_IGNORE, "dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}


class DataNotFound(ConfigError, FileNotFoundError):
    """A data path that does not exist."""


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _sentence(error: BaseException) -> str:
    """The cause of an error in one line."""
    while error.__cause__ is not None and isinstance(error, datasets.exceptions.DatasetsError):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _load(path: str, *args: Any, **options: Any) -> Any:
    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:
        raise ConfigError(f"data path {path!r} cannot be read: {_sentence(error)}.") from error


def _choose_split(path: str, splits: Iterable[str], split: str | None) -> str:
    """The wanted split, or the one to take where none is named.

    Raises:
        ConfigError: a split that does not exist; the message lists those that do.
    """
    splits = [str(name) for name in splits]
    listed = ", ".join(splits)
    if split is not None:
        wanted = [name.split("[")[0].strip() for name in split.split("+")]
        if missing := [name for name in wanted if name not in splits and name != "all"]:
            raise ConfigError(f"{path} has no split {missing[0]!r}; its splits are {listed}.")
        return split
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        raise ConfigError(f"{path} has the splits {listed}: say which one with the key 'split'.")
    logger.warning("%s has the splits %s: train is used, for the key 'split' is not given.", path, listed)
    return "train"


def _read_saved(path: Path, split: str | None) -> datasets.Dataset:
    """A folder that ``save_to_disk`` wrote."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(f"data path {str(path)!r} cannot be read: {_sentence(error)}.") from error
    if isinstance(saved, datasets.DatasetDict):
        name = _choose_split(str(path), saved, split)
        if name not in saved:
            raise ConfigError(
                f"{path} was written by save_to_disk: split must be one of {', '.join(saved)}, got {name!r}."
            )
        return saved[name]
    _choose_split(str(path), [str(saved.split or "train")], split)
    return saved


def _text_columns(files: Sequence[Path], kind: str) -> dict[str, Any]:
    """How to read CSV files: every cell is text ("007" and "NA" stay what they are), an empty cell is null."""
    opened = COMPRESSED.get(files[0].suffix.lower(), open)
    with opened(files[0], "rt", encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        separator = "\t" if kind == "tsv" else max(",;\t", key=first.count)
        lines.seek(0)
        names = next(csv.reader(lines, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {
        "sep": separator,
        "features": features,
        "keep_default_na": False,
        "na_values": [""],
        "encoding": "utf-8-sig",
    }


def _read_files(path: Path, splits: Mapping[str, Sequence[Path]], split: str | None) -> datasets.Dataset:
    """The files of the wanted split, all of one format."""
    name = _choose_split(str(path), splits, split)
    wanted = {key: files for key, files in splits.items() if name == "all" or key in _names(name)}
    kind = _format(next(iter(wanted.values()))[0])
    if all(file.stat().st_size == 0 for files in wanted.values() for file in files):
        raise ConfigError(f"{path} has no rows.")
    options = (
        _text_columns([file for files in wanted.values() for file in files], kind) if kind in ("csv", "tsv") else {}
    )
    data_files = {key: [str(file) for file in files] for key, files in wanted.items()}
    return _load(str(path), BUILDERS.get(kind, kind), data_files=data_files, split=name, **options)


def _names(split: str) -> list[str]:
    return [part.split("[")[0].strip() for part in split.split("+")]


def _tables(path: Path) -> list[Path]:
    """The files of rows in a folder and its sub-folders."""
    found = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and file.name not in BOOKKEEPING and _format(file):
            found.append(file)
    return found


def _splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Which files belong to which split, by the rules of ``datasets`` (names of files, then of folders)."""
    known = {str(file.absolute()): file for file in files}

    def resolve(pattern: str) -> list[str]:
        found = [name for name in resolve_pattern(pattern, base_path=str(path.absolute())) if name in known]
        if not found:
            raise FileNotFoundError(pattern)
        return found

    patterns = _get_data_files_patterns(resolve)
    splits: dict[str, list[Path]] = {}
    for split, of_split in patterns.items():
        names: dict[str, None] = {}
        for pattern in of_split:
            try:
                names |= dict.fromkeys(resolve(pattern))
            except FileNotFoundError:
                continue
        splits[str(split)] = [known[name] for name in names]
    used = {file for split in splits.values() for file in split}
    if unused := [file for file in files if file not in used]:
        listed = ", ".join(str(file.relative_to(path)) for file in unused[:5])
        raise ConfigError(
            f"{path} has files for the splits {', '.join(splits)}, and {len(unused)} beside them that belong to none: "
            f"{listed}; name one file, or move them away."
        )
    return splits


def _has_configs(path: Path) -> bool:
    """Whether a folder is a copy of a hub dataset whose README says which files are which."""
    readme = path / "README.md"
    try:
        return readme.is_file() and bool(DatasetCard.load(readme, ignore_metadata_errors=True).data.get("configs"))
    except ValueError:
        return False


def _read_builder(path: Path, subset: str | None, split: str | None, *args: Any, **options: Any) -> datasets.Dataset:
    """A folder that ``datasets`` understands by itself."""
    try:
        builder = datasets.load_dataset_builder(*args, name=subset, **options)
        splits = list(builder.config.data_files or {})
    except Exception as error:
        raise ConfigError(f"data path {str(path)!r} cannot be read: {_sentence(error)}.") from error
    return _load(str(path), *args, name=subset, split=_choose_split(str(path), splits, split), **options)


def _read_folder(path: Path, subset: str | None, split: str | None) -> tuple[datasets.Dataset, list[Path]]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, split), [path]
    if _has_configs(path):
        return _read_builder(path, subset, split, str(path)), [path]
    if subset is not None:
        raise ConfigError(f"subset={subset!r} has no effect on the folder {path}: its README.md names no configs.")
    files = _tables(path)
    if files and all(file.name in METADATA for file in files):
        return _read_builder(path, None, split, "imagefolder", data_dir=str(path)), [path]
    kinds = {_format(file): file for file in reversed(files)}
    if len(kinds) != 1:
        found = ", ".join(str(file.relative_to(path)) for file in kinds.values()) or "none"
        raise ConfigError(
            f"data path {str(path)!r} must be a file, or a folder of files, of one format out of "
            f"{', '.join(FORMATS)}; found {found}."
        )
    folders = dict.fromkeys([path, *(file.parent for file in files)])
    return _read_files(path, _splits(path, files), split), list(folders)


def _read_hub(path: str, subset: str | None, split: str | None, revision: str | None) -> datasets.Dataset:
    return _load(path, path, subset, split=split or "train", revision=revision)


def read_rows(
    path: str, subset: str | None = None, split: str | None = None, revision: str | None = None
) -> tuple[datasets.Dataset, Folders]:
    """Open a table: see ``vgs.data.sources.DataSource`` for what ``path`` may be.

    Returns:
        The rows, whose image features are not decoded, and where paths in them may lead.

    Raises:
        DataNotFound: a local path that does not exist.
        ConfigError: files that cannot be read, or a split that does not exist.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if _format(local) or local.is_absolute() or path.startswith((".", "~")):
            raise DataNotFound(f"data path {path!r} does not exist.")
        rows = _read_hub(path, subset, split, revision)
        caches = (
            Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}",
            Path(datasets.config.DOWNLOADED_DATASETS_PATH),
        )
        return undecoded(rows), Folders(only_inside=caches)
    if revision is not None:
        raise ConfigError(f"revision={revision!r} belongs to a dataset on the hub, but {path} is on this machine.")
    if local.is_dir():
        rows, folders = _read_folder(local, subset, split)
        return undecoded(rows), Folders(tuple(folders))
    if _format(local) is None:
        raise ConfigError(
            f"data path {path!r} must be a file, or a folder of files, of one format out of {', '.join(FORMATS)} "
            f"(with {', '.join(COMPRESSED)} after it if compressed); found {local.name}."
        )
    if subset is not None:
        raise ConfigError(f"subset={subset!r} has no effect on the file {path}.")
    return undecoded(_read_files(local, {"train": [local]}, split)), Folders((local.parent,))


def _undecode(feature: Any) -> None:
    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, dict):
        for part in feature.values():
            _undecode(part)
    elif isinstance(feature, (list, tuple)):
        for part in feature:
            _undecode(part)
    elif hasattr(feature, "feature"):  # List, LargeList, Sequence
        _undecode(feature.feature)


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, whose pictures come as ``{"bytes", "path"}`` at every depth.

    ``cast_column`` does so without a copy of the data only for an ``Image`` at the top.
    """
    rows = rows.select_columns(rows.column_names)  # features of its own
    _undecode(rows.features)
    return rows
