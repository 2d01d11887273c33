"""A hub of data sets on this machine: as much of its interface as ``datasets`` asks for."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]
ASKED = re.compile(r"(?:/api)?/datasets/(\w+/\w+)(?:/(revision|tree|paths-info|resolve)/(\w+)(?:/(.*))?)?")


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _commit(files: Files) -> str:
    return _digest(repr(sorted(files.items())).encode())


def _entries(files: Files) -> dict[str, dict]:
    """Files and folders by path, as the hub describes them."""
    found = {}
    for path, data in files.items():
        for folder in list(PurePosixPath(path).parents)[:-1]:
            found[str(folder)] = {"type": "directory", "path": str(folder), "oid": _digest(str(folder).encode())}
        found[path] = {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    stored: Mapping[str, Mapping[str, Files]]  # files by data set and by branch, tag or commit

    def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        body = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        match = ASKED.fullmatch(unquote(asked.path))
        name, kind, revision, path = match.groups() if match else (None, None, None, None)
        if name not in self.stored:
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        files = self.stored[name].get(revision or "main")
        if files is None:
            return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        entries, path = _entries(files), path or ""
        if path and path not in entries:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        if kind == "resolve":
            return self.answer(files[path], ETag=f'"{_digest(files[path])}"', X_Repo_Commit=_commit(files))
        if kind == "tree":
            deep = parse_qs(asked.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            below = [x for x in entries.values() if PurePosixPath(path) in PurePosixPath(x["path"]).parents]
            value = [x for x in below if deep or PurePosixPath(x["path"]).parent == PurePosixPath(path)]
        elif kind == "paths-info":
            value = [entries[x] for x in body["paths"] if x in entries]
        else:
            value = {"id": name, "sha": _commit(files), "siblings": [{"rfilename": x} for x in files], "tags": []}
        return self.answer(json.dumps(value).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub(sets: Mapping[str, Mapping[str, Files]]) -> Iterator[str]:
    """Serve data sets (``owner/name``), of every branch or tag its files; yields the address, for ``HF_ENDPOINT``."""
    stored = {name: {**own, **{_commit(files): files for files in own.values()}} for name, own in sets.items()}
    handler = type("Handler", (_Handler,), {"stored": stored})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
