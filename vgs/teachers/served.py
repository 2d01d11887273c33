"""A teacher that runs in a server of ``vgs serve-teacher``, on another GPU or another machine."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import AutoConfig

from ..errors import ConfigError, config_errors, in_one_line
from ..models.groups import PromptGroup, response_lengths
from ..models.heads import Head
from ..models.pictures import check_pictures, reads_pictures
from ..models.tokenizers import check_same_tokens, tokenizer_of
from ..models.vocabulary import common_rows
from .cache import VIEWS
from .fingerprints import head_fingerprint, vocabulary_fingerprint
from .local import KeptHead
from .protocol import TeacherFacts, Then
from .server import PROTOCOL, TOKEN, is_loopback, read_token
from .wire import Malformed, pack_groups, unpack, unpack_head

logger = logging.getLogger(__name__)

EXAMPLE = "http://127.0.0.1:8017"
ATTEMPTS = 8  # two minutes, in which a server may be started again
FIRST_WAIT = 1.0  # seconds, doubled before each further attempt
TIMEOUT = 600.0  # seconds without a byte
BUSY = (502, 503, 504)


@dataclass
class TeacherClient:
    """Asks a server, again where a connection breaks.

    Attributes:
        url: of the server, such as ``"http://127.0.0.1:8017"``.
        token: of the server; None where it has none.
        attempts: how often a request is made before it fails.
        timeout: seconds without a byte after which an attempt has failed.
    """

    url: str
    token: str | None = None
    attempts: int = ATTEMPTS
    timeout: float = TIMEOUT
    _connection: http.client.HTTPConnection | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"a teacher's url must be like {EXAMPLE}, got {self.url!r}: {error}.") from None
        if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"a teacher's url must be like {EXAMPLE}, got {self.url!r}.")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("a teacher's url holds no user or password; the token comes from a file or a variable.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=self.timeout)
        if self.token is not None and parts.scheme == "http" and not is_loopback(host):
            logger.warning("The token of %s goes over the network unencrypted: use https or an SSH tunnel.", self.url)

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """The body of an answer.

        Args:
            path: of the request.
            body: to be posted; None gets.

        Raises:
            ConfigError: no answer after all attempts, or one that refuses.
        """
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        method, problem = "GET" if body is None else "POST", ""
        for attempt in range(self.attempts):
            if attempt:
                wait = FIRST_WAIT * 2 ** (attempt - 1)
                logger.warning("The teacher at %s does not answer (%s); again in %.0f s.", self.url, problem, wait)
                time.sleep(wait)
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException) as error:
                problem = in_one_line(error)
                continue
            finally:  # a new connection each time: a server gives up one that says nothing between two steps
                self._connection.close()
            if answer.status == 200:
                return data
            problem = f"{answer.status} {_sentence(data)}"
            if answer.status not in BUSY:
                hint = f" Set {TOKEN} or token_file." if answer.status == 401 else ""
                raise ConfigError(f"the teacher at {self.url} refuses {path}: {problem}{hint}")
        raise ConfigError(
            f"the teacher at {self.url} does not answer after {self.attempts} attempts ({problem}): start it by `vgs "
            "serve-teacher MODEL`, or correct the url."
        )

    def json(self, path: str) -> dict[str, Any]:
        """An answer that is a JSON object.

        Raises:
            ConfigError: as ``ask``, or another answer.
        """
        data = self.ask(path)
        try:
            found = json.loads(data)
        except ValueError as error:
            raise ConfigError(
                f"the teacher at {self.url} answers {path} with no JSON: is it `vgs serve-teacher`?"
            ) from error
        if not isinstance(found, dict):
            raise ConfigError(f"the teacher at {self.url} answers {path} with {type(found).__name__}, no object.")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What the server says of its model.

        Raises:
            ConfigError: as ``json``, or a server of another protocol.
        """
        found = self.json("/fingerprint")
        wanted = ("config", "weights", "head", "head_rows", "placeholder_ids", "vocabulary", "special_tokens")
        if found.get("protocol") != PROTOCOL or any(name not in found for name in wanted):
            raise ConfigError(
                f"the teacher at {self.url} speaks protocol {found.get('protocol')!r}, expected {PROTOCOL}: both sides "
                "need the same version of vgs."
            )
        return found

    def head(self, wanted: str) -> Head:
        """The output head, on the CPU.

        Args:
            wanted: its fingerprint.

        Raises:
            ConfigError: as ``ask``, or another head.
        """
        data = self.ask("/head")
        try:
            head = unpack_head(data)
        except Malformed as error:
            raise ConfigError(f"the teacher at {self.url} sends no output head: {error}") from error
        if head_fingerprint(head) != wanted:
            raise ConfigError(f"the teacher at {self.url} sends another output head than its fingerprint names.")
        return head


def _sentence(data: bytes) -> str:
    """What a refusal says."""
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(data[:200].decode(errors="replace").split())


@dataclass
class ServedTeacher:
    """A teacher in a server. Its head is fetched once, and checked by its hash.

    Attributes:
        client: asks.
        device: where hidden states and head are wanted.
        share_prefix, kernel: as of ``LocalTeacher``; the server runs the rows that a teacher here would run.
        sharded, facts: see ``protocol.Teacher``.
        weights: fingerprint of the weights, which must not change during a run.

    Raises:
        ConfigError: no server there, or one that refuses.
    """

    client: TeacherClient
    device: torch.device
    share_prefix: bool = True
    kernel: str = "auto"
    sharded: bool = False
    facts: TeacherFacts = field(init=False)
    weights: str = field(init=False)
    _kept: KeptHead = field(init=False, repr=False)
    _says: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = self._says = self.client.fingerprint()
        self.facts = TeacherFacts(f"the teacher at {self.client.url}", found["head_rows"], found["placeholder_ids"])
        self.weights = found["weights"]
        head = self.client.head(found["head"])
        bias = None if head.bias is None else head.bias.to(self.device)
        self._kept = KeptHead(Head(head.weight.to(self.device), bias, head.logit_scale, head.softcap))

    def check(self, processor: Any, student: Any, vocab_size: int | None) -> None:
        """See ``check_served``."""
        check_served(self.client, self._says, processor, student, vocab_size)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def states(self, groups: list[PromptGroup], text: bool, then: Then) -> dict[str, Tensor]:
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        body = pack_groups(
            groups,
            text=text,
            share_prefix=self.share_prefix,
            kernel=self.kernel,
            autocast="none" if autocast is None else str(autocast).removeprefix("torch."),
        )
        views, count = VIEWS if text else VIEWS[:1], sum(response_lengths(groups))
        try:
            rows, notes = unpack(self.client.ask("/states", body))
        except Malformed as error:
            raise ConfigError(f"{self.facts.what} sends no hidden states: {error}") from error
        if notes.get("weights") != self.weights:
            raise ConfigError(f"{self.facts.what} has other weights than at the start of this run: start it as it was.")
        if set(rows) != set(views) or any(len(rows[view]) != count for view in views):
            shapes = {view: tuple(x.shape) for view, x in rows.items()}
            raise ConfigError(f"{self.facts.what} sends hidden states {shapes}, expected {count} rows of {views}.")
        return then([rows[view].to(self.device) for view in views])

    def head(self, dtype: torch.dtype) -> AbstractContextManager[Head]:
        return self._kept.whole()


def check_served(
    client: TeacherClient, says: Mapping[str, Any], processor: Any, student: Any, vocab_size: int | None
) -> int | None:
    """Stop at a server whose teacher cannot read the student's prompts, or has other tokens.

    Args:
        client: of the server.
        says: its fingerprint.
        processor: the student's.
        student: its transformers config.
        vocab_size: columns that the loss uses; None: as many as both have.

    Returns:
        The columns that both have; None for all.

    Raises:
        ConfigError: another family, patches, image tokens or tokens.
    """
    what = f"the teacher at {client.url}"
    with config_errors(f"{what} has a config that cannot be read", ValueError, KeyError, TypeError, AttributeError):
        config = AutoConfig.for_model(**says["config"])
    if reads_pictures(student):
        if not reads_pictures(config):
            raise ConfigError(f"{what} is of the type {config.model_type!r}, which reads no pictures.")
        check_pictures(student, config, (getattr(student, "name_or_path", "") or "the student", what))
    columns = common_rows(student, says["head_rows"], vocab_size, what)
    own = tokenizer_of(processor).get_vocab()
    if says["vocabulary"] is None:
        logger.warning("%s has no tokenizer beside it: whether its tokens are the student's is unknown.", what)
    elif vocabulary_fingerprint(own) != says["vocabulary"]:
        words = client.json("/vocabulary")
        theirs = SimpleNamespace(get_vocab=lambda: words, **says["special_tokens"])
        with config_errors(what, ValueError):
            check_same_tokens(processor, theirs, columns)
    return columns


def connect(url: str, token_file: str | None, device: torch.device, share_prefix: bool, kernel: str) -> ServedTeacher:
    """The teacher in a server.

    Args:
        url: of it.
        token_file: with its token; None: see ``server.read_token``.
        device, share_prefix, kernel: as of ``ServedTeacher``.

    Raises:
        ConfigError: as ``ServedTeacher``, or a token that cannot be read.
    """
    return ServedTeacher(TeacherClient(url, read_token(token_file)), device, share_prefix, kernel)
