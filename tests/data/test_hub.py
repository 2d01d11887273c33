"""Data sets of the hub: pinned revisions, splits, and no way to files of this machine."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import hub
from tiny import tiny_image

ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, sys
from vgs.data.sources import DataSource, load_samples
for options in json.loads(sys.argv[1]):
    try:
        samples = load_samples(DataSource(**options))
        found = [[x["answer"], x["images"][0].tobytes().hex() if x["images"] else ""] for x in samples]
    except ValueError as error:
        found = f"{type(error).__name__}: {error}"
    print("FOUND", json.dumps(found))
"""


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(answer: str, images: list) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"question": "red ?", "answer": answer, "images": x} for x in images]), buffer)
    return buffer.getvalue()


def lines(answer: str, images: list) -> bytes:
    return "".join(json.dumps({"question": "red ?", "answer": answer, "images": x}) + "\n" for x in images).encode()


def read(tmp_path: Path, sets: dict[str, dict[str, dict[str, bytes]]], *options: dict) -> list:
    """What a process of its own reads, with nothing but this hub and an empty cache."""
    with hub(sets) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", READ, json.dumps(options)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    found = [json.loads(line.removeprefix("FOUND ")) for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(options), run.stderr
    return found


@pytest.mark.slow
def test_a_revision_is_pinned_and_splits_are_kept(tmp_path: Path) -> None:
    picture = tiny_image(1).tobytes().hex()
    table = {"bytes": png(1), "path": None}
    revisions = {
        "main": {
            "data/train-00000-of-00001.parquet": parquet("new", [table]),
            "data/test-00000-of-00001.parquet": parquet("held out", [table]),
        },
        "v1": {"data/train-00000-of-00001.parquet": parquet("old", [table])},
    }
    newest, old, test, no_split, no_revision, missing = read(
        tmp_path,
        {"own/data": revisions},
        {"path": "own/data"},
        {"path": "own/data", "revision": "v1"},
        {"path": "own/data", "split": "test"},
        {"path": "own/data", "split": "dev"},
        {"path": "own/data", "revision": "v9"},
        {"path": "own/other"},
    )
    assert (newest, old, test) == ([["new", picture]], [["old", picture]], [["held out", picture]])
    assert no_split.startswith(
        "ConfigError: data path 'own/data' cannot be read: Unknown split \"dev\". Should be one of"
    )
    assert no_revision.startswith("ConfigError: data path 'own/data' cannot be read: ")
    assert missing.startswith("ConfigError: data path 'own/other' cannot be read: Dataset 'own/other' doesn't exist")
    for error in (no_split, no_revision, missing):
        assert "\n" not in error


@pytest.mark.slow
def test_rows_of_the_hub_cannot_open_files_of_this_machine(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(2))
    uri = f"data:image/png;base64,{base64.b64encode(png(3)).decode()}"
    sets = {"own/uris": {"main": {"train.jsonl": lines("a", [uri])}}}
    pictures = {
        "1.png": png(1),
        "metadata.jsonl": json.dumps({"file_name": "1.png", "question": "?", "answer": "b"}).encode(),
    }
    sets["own/folder"] = {"main": pictures}
    for number, path in enumerate((str(secret), secret.as_uri(), "secret.png", "~/secret.png")):
        sets[f"own/texts{number}"] = {"main": {"train.jsonl": lines("a", [path])}}
        sets[f"own/tables{number}"] = {"main": {"train.parquet": parquet("a", [{"bytes": None, "path": path}])}}
    uris, folder, *refused = read(tmp_path, sets, *({"path": name} for name in sets))
    assert uris == [["a", tiny_image(3).tobytes().hex()]]
    assert folder == [["b", tiny_image(1).tobytes().hex()]], "pictures that the data set itself holds"
    assert len(refused) == 8
    for found in refused:
        assert found.startswith("ConfigError: Row 0 of own/t")
        assert "cannot read 'images': " in found
        assert found.endswith("is a path, and rows from the hub cannot open files of this machine.")
