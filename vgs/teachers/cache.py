"""Hidden states of a teacher on the disk: computed once on given responses, found again by what they were computed of.

A cache is a folder: ``manifest.json`` says what it was made from, ``head.safetensors`` holds the teacher's output head,
and ``states-00000.safetensors``, ... hold responses and their hidden states. Each file appears whole or not at all, so
a build that is killed goes on where it was. A token takes 2 * Dt bytes a view in 16 bits: 8 KB for a width of 4,096.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError
from ..models.heads import Head
from .fingerprints import head_fingerprint, tensor_bytes
from .protocol import TeacherFacts
from .wire import Malformed, pack, pack_head, unpack_head

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, HEAD, LOCK = "manifest.json", "head.safetensors", "cache.lock"
OPEN_FILES = 64
VIEWS = ("image", "text")


@dataclass(frozen=True)
class Manifest:
    """What a cache was made from.

    Attributes:
        weights: fingerprint of the teacher's weights. head: of its output head.
        rendering: fingerprint of what the student's processor makes of fixed texts and pictures.
        data: fingerprint of the rows. responses: where they are from, in words.
        per_prompt: responses to each prompt.
        autocast: type of mixed precision, ``"none"`` for none. computed: type of the states as they were computed.
        stored: their type in the files.
        views: of the states.
        versions: of the libraries that computed them.
        rows: entries of the data; each file holds ``rows_per_file`` of them.
        head_rows, placeholder_ids: see ``TeacherFacts``.
        format: of the files.
    """

    weights: str
    head: str
    rendering: str
    data: str
    responses: str
    per_prompt: int
    autocast: str
    computed: str
    stored: str
    views: list[str]
    versions: dict[str, str]
    rows: int
    rows_per_file: int
    head_rows: int
    placeholder_ids: list[int]
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            ConfigError: there is none, or one of another format.
        """
        try:
            found = json.loads((folder / MANIFEST).read_text())
            found = found if isinstance(found, dict) else {}
        except FileNotFoundError:
            raise ConfigError(
                f"the teacher's cache {str(folder)!r} has no {MANIFEST}: make it by `vgs cache-teacher CONFIG`."
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(folder / MANIFEST)!r} cannot be read: {error}") from error
        if found.get("format") != FORMAT or set(found) != {field.name for field in fields(cls)}:
            raise ConfigError(
                f"the teacher's cache {str(folder)!r} has the format {found.get('format')!r}, expected {FORMAT}: make "
                "it anew."
            )
        return cls(**found)

    @property
    def files(self) -> int:
        return -(-self.rows // self.rows_per_file)


#: Fields of a manifest in the words of its errors, in the order in which they are compared.
WORDS = {
    "weights": "another teacher's weights",
    "head": "another output head",
    "rendering": "another processor, chat template or tokenizer",
    "data": "other rows",
    "responses": "other responses",
    "per_prompt": "another number of responses to each prompt",
    "autocast": "another mixed precision",
    "computed": "another type of hidden states",
    "stored": "another type in its files",
    "views": "other views",
    "versions": "other versions of the libraries",
    "rows": "another number of rows",
    "rows_per_file": "another number of rows per file",
}


def _differs(folder: Path, name: str, old: Any, new: Any) -> ConfigError:
    short = [f"{x[:12]}..." if isinstance(x, str) and len(x) > 40 else repr(x) for x in (old, new)]
    return ConfigError(
        f"the teacher's cache {str(folder)!r} was made from {WORDS[name]} ({name} was {short[0]}, now {short[1]}): "
        "make it anew in another folder, or take what it was made from."
    )


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears with all of its content or not at all, also where the machine stops."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Entry:
    """One response of T tokens and what the teacher says of it.

    Attributes:
        row: its place among the rows of the data.
        prompt: of ``fingerprints.prompt_fingerprint``.
        response: [T] int64 token ids.
        states: view -> [T, Dt].
    """

    row: int
    prompt: bytes
    response: Tensor
    states: Mapping[str, Tensor]


class CacheWriter:
    """Builds a cache, or goes on building one.

    Args:
        folder: of the cache; made where it does not exist.
        manifest: what it is made from.
        head: the teacher's output head.

    Raises:
        ConfigError: the folder holds a cache that was made from something else.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, head: Head) -> None:
        self.folder, self.manifest, self._head = Path(folder), manifest, head

    @contextmanager
    def building(self) -> Iterator[list[int]]:
        """The folder is this process's inside.

        Yields:
            The numbers of the files that are missing.

        Raises:
            ConfigError: another process builds it, it was made from something else, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise ConfigError(f"the teacher's cache {str(self.folder)!r} is being built by another process.") from None
        except OSError as error:
            raise ConfigError(f"the teacher's cache {str(self.folder)!r} cannot be written: {error}") from error
        try:
            for part in self.folder.glob("*.part"):
                part.unlink()
            if (self.folder / MANIFEST).exists():
                old = Manifest.read(self.folder)
                for name in WORDS:
                    if getattr(old, name) != getattr(self.manifest, name):
                        raise _differs(self.folder, name, getattr(old, name), getattr(self.manifest, name))
            else:
                write_whole(self.folder / HEAD, pack_head(self._head))
                write_whole(self.folder / MANIFEST, json.dumps(asdict(self.manifest), indent=1).encode())
            yield [number for number in range(self.manifest.files) if not _is_whole(self.folder, number)]
        finally:
            lock.release()

    def rows_of(self, number: int) -> range:
        """The rows whose responses a file holds."""
        first = number * self.manifest.rows_per_file
        return range(first, min(first + self.manifest.rows_per_file, self.manifest.rows))

    def write(self, number: int, entries: Sequence[Entry]) -> None:
        """One file.

        Args:
            number: of it.
            entries: all responses to its rows.
        """
        stored = getattr(torch, self.manifest.stored)
        tensors = {
            "rows": torch.tensor([entry.row for entry in entries], dtype=torch.int64),
            "prompts": torch.tensor([list(entry.prompt) for entry in entries], dtype=torch.uint8).view(-1, 32),
            "lengths": torch.tensor([len(entry.response) for entry in entries], dtype=torch.int64),
            "ids": torch.cat([entry.response for entry in entries]),
        }
        for view in self.manifest.views:
            tensors[view] = torch.cat([entry.states[view].to("cpu", stored) for entry in entries])
        write_whole(_path(self.folder, number), pack(tensors, {}))


def _path(folder: Path, number: int) -> Path:
    return folder / f"states-{number:05d}.safetensors"


def _is_whole(folder: Path, number: int) -> bool:
    try:
        with safe_open(_path(folder, number), "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _digest(response: Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(response)).digest()


class StateCache:
    """A finished cache, opened for reading; hidden states are read when they are asked for.

    Args:
        folder: of ``vgs cache-teacher``.

    Attributes:
        manifest: what it was made from. facts: of its teacher.

    Raises:
        ConfigError: no cache, one that is not finished, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = Manifest.read(self.folder)
        self.facts = TeacherFacts(f"the teacher's cache {str(folder)!r}", manifest.head_rows, manifest.placeholder_ids)
        missing = [n for n in range(manifest.files) if not _path(self.folder, n).exists()]
        if missing or not (self.folder / HEAD).exists():
            raise ConfigError(
                f"the teacher's cache {str(folder)!r} is not finished: {len(missing)} of {manifest.files} files are "
                "missing. Go on with the same `vgs cache-teacher` command."
            )
        #: Prompt -> hash of a response -> (file, first token, end).
        self._places: dict[bytes, dict[bytes, tuple[int, int, int]]] = defaultdict(dict)
        self._open = lru_cache(maxsize=OPEN_FILES)(self._opened)
        for number in range(manifest.files):
            self._index(number)

    def _opened(self, number: int) -> Any:
        path = _path(self.folder, number)
        try:
            return safe_open(path, "pt").__enter__()  # a view into the file, closed with its object
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{str(path)!r} is damaged ({error}): delete it and run `vgs cache-teacher` again."
            ) from error

    def _index(self, number: int) -> None:
        file, first = self._open(number), 0
        prompts, lengths, ids = (file.get_tensor(name) for name in ("prompts", "lengths", "ids"))
        for prompt, response in zip(prompts, ids.split(lengths.tolist()), strict=True):
            place = (number, first, first + len(response))
            self._places[bytes(prompt.tolist())].setdefault(_digest(response), place)
            first += len(response)

    def check(self, **now: Any) -> None:
        """Stop at a cache that was made from something else.

        Args:
            **now: fields of the manifest as they are in this run; versions that differ are warned of alone.

        Raises:
            ConfigError: the first field that differs.
        """
        for name in WORDS:
            if name not in now or getattr(self.manifest, name) == now[name]:
                continue
            if name != "versions":
                raise _differs(self.folder, name, getattr(self.manifest, name), now[name])
            logger.warning(
                "The teacher's cache %s was made with other versions: %s, now %s.",
                *(self.folder, self.manifest.versions, now[name]),
            )

    def responses(self, prompt: bytes) -> list[list[int]]:
        """Token ids of the recorded responses to a prompt, in the order of the data; none for a prompt without any.

        Args:
            prompt: of ``fingerprints.prompt_fingerprint``.
        """
        places = self._places.get(prompt, {}).values()
        return [self._open(number).get_slice("ids")[first:end].tolist() for number, first, end in places]

    def find(self, prompt: bytes, response: Tensor) -> dict[str, Tensor] | None:
        """view -> [T, Dt] states of a response on the CPU, in the type in which they were computed; None: not here.

        Args:
            prompt: of ``fingerprints.prompt_fingerprint``.
            response: [T] int64 token ids.
        """
        place = self._places.get(prompt, {}).get(_digest(response))
        if place is None:
            return None
        number, first, end = place
        file, computed = self._open(number), getattr(torch, self.manifest.computed)
        return {view: file.get_slice(view)[first:end].to(computed) for view in self.manifest.views}

    def head(self, device: torch.device) -> Head:
        """The teacher's output head.

        Args:
            device: where to put it.

        Raises:
            ConfigError: the file does not hold the head of the manifest.
        """
        try:
            head = unpack_head((self.folder / HEAD).read_bytes())
        except (Malformed, OSError) as error:
            raise ConfigError(f"{str(self.folder / HEAD)!r} cannot be read: {error}") from error
        if head_fingerprint(head) != self.manifest.head:
            raise ConfigError(f"{str(self.folder / HEAD)!r} is not the head that its manifest names: make it anew.")
        bias = None if head.bias is None else head.bias.to(device)
        return Head(head.weight.to(device), bias, head.logit_scale, head.softcap)
