"""A teacher behind HTTP: hidden states of the prompts and responses that it is sent.

Standard library only. Every request but ``/health`` needs the token, where there is one. Bodies and answers are in the
safetensors format (``wire``); requests are answered one at a time, for the model fills its device alone.

    GET /health        {"ok": true}, without the token: whether there is a server at all
    GET /fingerprint   what the teacher is: its config, tokenizer, head, and hashes of them
    GET /vocabulary    token -> id, as JSON
    GET /head          the output head
    POST /states       prompts with their responses -> [N, Dt] hidden states of one or both views
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import os
import threading
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, in_one_line
from ..models.attention import KERNELS
from ..models.families import device_of
from ..models.heads import Head, read_head
from .cache import VIEWS
from .fingerprints import computing_versions, head_fingerprint, vocabulary_fingerprint, weights_fingerprint
from .local import LocalTeacher, facts_of
from .wire import Malformed, pack, pack_head, unpack_groups

logger = logging.getLogger(__name__)

PROTOCOL = 1
PORT = 8017
MAX_REQUEST = 2**30  # bytes: 50 pictures of 1,000 tokens in float32
IDLE = 60  # seconds that a connection may say nothing
TOKEN, TOKEN_FILE = "VGS_TEACHER_TOKEN", "VGS_TEACHER_TOKEN_FILE"
SHORTEST_TOKEN = 16  # characters
PRECISIONS = ("none", "bfloat16", "float16")


def read_token(path: str | None = None) -> str | None:
    """The token of a server: from a file, else from the environment (VGS_TEACHER_TOKEN, VGS_TEACHER_TOKEN_FILE).

    Args:
        path: of the file; None: the environment decides.

    Returns:
        The token; None where there is none.

    Raises:
        ConfigError: a file that cannot be read, or a token that is too short or no plain text.
    """
    path = path or (None if TOKEN in os.environ else os.environ.get(TOKEN_FILE))
    if path is None:
        token, origin = os.environ.get(TOKEN), TOKEN
    else:
        origin = f"the token file {path!r}"
        try:
            token = Path(path).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{origin} cannot be read: {in_one_line(error)}.") from error
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{origin} must hold at least {SHORTEST_TOKEN} printable characters without blanks, got {len(token)}: try "
            "`openssl rand -hex 32`."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServedModel:
    """What a server says of its model.

    Args:
        model: unwrapped, on its device, in evaluation mode.
        tokenizer: beside it; None: the trainer cannot compare the tokens.
        name: of the model, for people.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        self.model, self.lock = model, threading.Lock()
        self.vocabulary = None if tokenizer is None else tokenizer.get_vocab()
        self.special = {
            key: str(value)
            for key in ("eos_token", "image_token", "video_token")
            if (value := getattr(tokenizer, key, None)) is not None
        }
        self.name = name
        self.facts, self.device = facts_of(model), device_of(model)

    @property
    def _head(self) -> Head:
        return read_head(self.model, self.model.get_input_embeddings().weight.dtype)

    @cached_property
    def head(self) -> bytes:
        """The output head, as it is sent."""
        return pack_head(self._head)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What ``/fingerprint`` says."""
        words = self.vocabulary
        return {
            "protocol": PROTOCOL,
            "name": self.name,
            "config": json.loads(self.model.config.to_json_string(use_diff=False)),
            "weights": weights_fingerprint(self.model),
            "head": head_fingerprint(self._head),
            "head_rows": self.facts.head_rows,
            "placeholder_ids": self.facts.placeholder_ids,
            "vocabulary": None if words is None else vocabulary_fingerprint(words),
            "special_tokens": self.special,
            "device": self.device.type,
            "versions": computing_versions(),
        }

    def states(self, body: bytes) -> bytes:
        """The answer to ``/states``.

        Raises:
            Malformed: a body that is not what is expected.
        """
        groups, notes = unpack_groups(body, self.facts.head_rows, self.device)
        options = {"text": bool, "share_prefix": bool, "kernel": str, "autocast": str}
        for key, kind in options.items():
            if type(notes.get(key)) is not kind:
                raise Malformed(f"notes must have {key!r}, a {kind.__name__}, got {notes.get(key)!r}.")
        if notes["autocast"] not in PRECISIONS or notes["kernel"] not in KERNELS:
            raise Malformed(f"autocast and kernel must be known names, got {notes['autocast']!r}, {notes['kernel']!r}.")
        if not groups or not any(group.responses for group in groups):
            raise Malformed("a request must hold at least one response.")
        enabled = notes["autocast"] != "none"
        precision = torch.autocast(self.device.type, getattr(torch, notes["autocast"], None), enabled=enabled)
        teacher = LocalTeacher(self.model, share_prefix=notes["share_prefix"], kernel=notes["kernel"], facts=self.facts)
        with self.lock, precision:
            rows = teacher.states(groups, notes["text"], lambda rows: dict(zip(VIEWS, rows, strict=False)))
        return pack(rows, {"weights": self.fingerprint["weights"]})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE
    server: TeacherServer

    def log_message(self, text: str, *values: object) -> None:
        logger.debug("%s %s", self.address_string(), text % values)

    def _answer(self, status: int, data: bytes | Mapping[str, Any], close: bool = False) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(data, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        # What is left of a body that nobody has read would be taken for the next request.
        self._answer(status, {"error": sentence}, close=True)

    def _allowed(self) -> bool:
        """Whether the request has the token; else it has been refused, before its body was read."""
        wanted = self.server.token
        if wanted is None:
            return True
        given = (self.headers.get("Authorization") or "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, f"Bearer {wanted}".encode()):
            return True
        self._refuse(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong.")
        return False

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(HTTPStatus.OK, {"ok": True})
            return
        if not self._allowed():
            return
        served = self.server.served
        if self.path == "/fingerprint":
            self._answer(HTTPStatus.OK, served.fingerprint)
        elif self.path == "/vocabulary" and served.vocabulary is not None:
            self._answer(HTTPStatus.OK, served.vocabulary)
        elif self.path == "/head":
            self._answer(HTTPStatus.OK, served.head)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path[:80]!r} here.")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        if self.path != "/states":
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path[:80]!r} here.")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a request must have a Content-Length.")
            return
        if int(length) > self.server.max_request:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request may have {self.server.max_request} bytes, got {int(length)}: lower max_tokens_per_pass, or "
                "start the server with a higher --max-request.",
            )
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return
        try:
            answer = self.server.served.states(body)
        except (Malformed, ConfigError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, in_one_line(error))
        except Exception as error:  # of the model: the server goes on, and the trainer is told
            logger.exception("a request could not be answered")
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {in_one_line(error)}")
        else:
            self._answer(HTTPStatus.OK, answer)


class TeacherServer(ThreadingHTTPServer):
    """Serves a model until ``shutdown``.

    Args:
        served: the model.
        host, port: where; port 0 takes any that is free.
        token: that requests must have; None: none is asked for.
        max_request: most bytes of a request.

    Raises:
        ConfigError: an address beyond this machine without a token, or one that cannot be had.
    """

    daemon_threads = True

    def __init__(
        self,
        served: ServedModel,
        host: str = "127.0.0.1",
        port: int = PORT,
        token: str | None = None,
        max_request: int = MAX_REQUEST,
    ) -> None:
        check_address(host, token)
        self.served, self.token, self.max_request = served, token, max_request
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"the address {host}:{port} cannot be had: {in_one_line(error)}.") from error


def check_address(host: str, token: str | None) -> None:
    """Stop before a model is loaded at an address that others reach, without a token.

    Args:
        host: to bind. token: of the server.

    Raises:
        ConfigError: such an address.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, so it needs a token: set {TOKEN}, or {TOKEN_FILE} to a "
            "file with one. Or keep to 127.0.0.1."
        )
