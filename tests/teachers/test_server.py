"""A teacher behind HTTP: the same bits, tokens, limits, and servers that are not what a run needs."""

from __future__ import annotations

import http.client
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_checkpoints import photo_samples, real_checkpoint
from teachers import FAMILY, assert_same, command, outcome, recorded_config, refused, taught
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vgs.cli import main as cli
from vgs.cli.serve_command import load_served, teacher_section
from vgs.errors import ConfigError
from vgs.teachers import served as client_side
from vgs.teachers.served import TeacherClient
from vgs.teachers.server import ServedModel, TeacherServer, read_token
from vgs.teachers.sources import TeacherSource
from vgs.teachers.wire import pack, pack_groups, unpack, unpack_head

Checkpoint = Callable[..., Path]
TOKEN = "0123456789abcdef-0123"


@contextmanager
def serving(served: ServedModel, **options) -> Iterator[str]:
    """The url of a server in a thread."""
    with TeacherServer(served, port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = real_checkpoint(FAMILY, tmp_path_factory.mktemp("served") / "teacher", teacher=True)
    return load_served(teacher_section(str(path), None, None), torch.device("cpu"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and no token from outside."""
    monkeypatch.setattr(client_side, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("VGS_TEACHER_TOKEN", raising=False)
    monkeypatch.delenv("VGS_TEACHER_TOKEN_FILE", raising=False)


@pytest.mark.parametrize("options", [{}, pytest.param({"max_tokens_per_pass": 500}, marks=pytest.mark.slow)])
def test_the_served_run_is_the_local_run_bit_by_bit(
    checkpoint: Checkpoint, tmp_path: Path, model: ServedModel, options: dict
) -> None:
    local = outcome(taught(checkpoint, tmp_path / "a", str(checkpoint(FAMILY, teacher=True)), **options))
    with serving(model) as url:
        trainer = taught(checkpoint, tmp_path / "b", TeacherSource(url=url), **options)
        assert trainer.teacher_model is None, "no teacher is loaded here"
        assert_same(outcome(trainer), local)


@pytest.mark.slow
def test_mixed_precision_is_the_trainers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A teacher in bfloat16 under the trainer's autocast, here and there."""
    path = str(checkpoint(FAMILY, teacher=True))
    dtype = {"dtype": "bfloat16"}
    local = outcome(taught(checkpoint, tmp_path / "a", TeacherSource(path, dtype), bf16=True))
    served = load_served(teacher_section(path, None, "bfloat16"), torch.device("cpu"))
    with serving(served) as url:
        assert_same(outcome(taught(checkpoint, tmp_path / "b", TeacherSource(url=url), bf16=True)), local)


@pytest.mark.slow
def test_a_served_teacher_among_several(checkpoint: Checkpoint, tmp_path: Path, model: ServedModel) -> None:
    rows = [{**x, "domain": y} for x, y in zip(photo_samples(tmp_path / "p"), ("here", "there", "here"), strict=True)]
    path = str(checkpoint(FAMILY, teacher=True))
    alone = outcome(taught(checkpoint, tmp_path / "a", path, rows))
    with serving(model) as url:
        teachers = {"here": path, "there": TeacherSource(url=url)}
        trainer = taught(checkpoint, tmp_path / "b", teachers, rows, teacher_column="domain")
        assert_same(outcome(trainer), alone, rtol=1e-4, atol=1e-6)


def test_a_token_is_asked_for(
    checkpoint: Checkpoint, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with serving(model, token=TOKEN) as url:
        assert json.loads(TeacherClient(url).ask("/health")) == {"ok": True}
        for token in (None, "0123456789abcdef-0124", TOKEN[:-1]):
            for path, body in (("/fingerprint", None), ("/head", None), ("/states", b"x")):
                with pytest.raises(ConfigError, match=f"refuses {path}: 401 the token is missing or wrong"):
                    TeacherClient(url, token).ask(path, body)
        assert TeacherClient(url, read_token(str(file))).fingerprint()["head_rows"] > 0
        monkeypatch.setenv("VGS_TEACHER_TOKEN", TOKEN)
        assert TeacherClient(url, read_token()).fingerprint()["protocol"] == 1
        monkeypatch.delenv("VGS_TEACHER_TOKEN")
        monkeypatch.setenv("VGS_TEACHER_TOKEN_FILE", str(file))
        assert read_token() == TOKEN
    monkeypatch.setenv("VGS_TEACHER_TOKEN", "short")
    with pytest.raises(ConfigError, match=r"VGS_TEACHER_TOKEN must hold at least 16 printable characters .* got 5"):
        read_token()
    with pytest.raises(ConfigError, match="the token file 'nowhere' cannot be read"):
        read_token("nowhere")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "example.org"])
def test_no_address_beyond_this_machine_without_a_token(host: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve-teacher", "nowhere", "--host", host])
    assert stop.value.code == 2
    assert "can be reached from other machines, so it needs a token" in capsys.readouterr().err


def raw(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and sentence of an answer to a request as it is given."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        if body:
            connection.send(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]
    finally:
        connection.close()


def test_requests_that_are_none(checkpoint: Checkpoint, model: ServedModel, tmp_path: Path) -> None:
    groups = taught(checkpoint, tmp_path, str(checkpoint(FAMILY, teacher=True))).anchor
    notes = {"text": False, "share_prefix": True, "kernel": "auto", "autocast": "none"}
    good = pack_groups([groups], **notes)
    tensors, _ = unpack(good)
    many = {"0.prompt": torch.tensor([10**6])}
    bad = {
        "expected safetensors": pickle.dumps({"a": 1}),
        "notes must say how many groups": pack(tensors, notes),
        r"0.prompt must be [T] int64": pack({**tensors, "0.prompt": torch.zeros(2)}, {"groups": 1, **notes}),
        "0.prompt must hold numbers from 0 to": pack(tensors | many, {"groups": 1, **notes}),
        "0.lengths must": pack({**tensors, "0.lengths": torch.tensor([0])}, {"groups": 1, **notes}),
        "0.images.x is no image field": pack({**tensors, "0.images.x": torch.zeros(1)}, {"groups": 1, **notes}),
        "notes must have 'text'": pack_groups([groups], **{**notes, "text": 1}),
        "must be known names": pack_groups([groups], **{**notes, "autocast": "int8"}),
        "at least one response": pack_groups([], **notes),
    }
    with serving(model, max_request=len(good) + 10_000) as url:
        for sentence, body in bad.items():
            status, says = raw(url, "POST", "/states", body, Content_Length=str(len(body)))
            assert status == 400 and sentence in says, (sentence, says)
        assert raw(url, "POST", "/states")[0] == 411
        assert raw(url, "POST", "/states", Content_Length="-5")[0] == 411
        status, says = raw(url, "POST", "/states", Content_Length="99999999999")
        assert status == 413 and "lower max_tokens_per_pass" in says
        assert raw(url, "GET", "/../etc/passwd")[0] == raw(url, "POST", "/head", Content_Length="0")[0] == 404
        broken = pack({**tensors, "0.images.pixel_values": torch.zeros(3, 3)}, {"groups": 1, **notes})
        status, says = raw(url, "POST", "/states", broken, Content_Length=str(len(broken)))
        assert status == 500 and says
        rows, _ = unpack(TeacherClient(url).ask("/states", good))  # and it goes on
        assert set(rows) == {"image"} and len(rows["image"]) == 1
        with pytest.raises(ConfigError, match=r"refuses /states: 413 a request may have \d+ bytes, got"):
            TeacherClient(url).ask("/states", b"x" * (len(good) + 20_000))


def test_a_server_that_fails_at_first_is_asked_again(model: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    with serving(model) as url, socket.create_server(("127.0.0.1", 0)) as door:
        target, seen = int(url.rpartition(":")[2]), []

        def flaky() -> None:
            """Twice the connection breaks, then it leads to the server."""
            while len(seen) < 3:
                connection, _ = door.accept()
                seen.append(connection)
                if len(seen) < 3:
                    connection.close()
                    continue
                with socket.create_connection(("127.0.0.1", target)) as onward:
                    onward.sendall(connection.recv(65536))
                    while data := onward.recv(65536):
                        connection.sendall(data)
                        if data.endswith(b'{"ok": true}'):
                            break
                connection.close()

        thread = threading.Thread(target=flaky, daemon=True)
        thread.start()
        client = TeacherClient(f"http://127.0.0.1:{door.getsockname()[1]}")
        assert json.loads(client.ask("/health")) == {"ok": True}
        thread.join()
    assert len(seen) == 3 and caplog.text.count("does not answer") == 2


def test_a_missing_server_is_one_sentence(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as door:  # a port that nobody else takes, and nobody listens at
        door.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        config = recorded_config(checkpoint, tmp_path) | {"teacher": {"url": url}}
        sentence = refused(capsys, "train", config)
        assert f"the teacher at {url} does not answer after 1 attempts" in sentence and "vgs serve-teacher" in sentence
        assert command("check", config) == 2
        assert f"the teacher at {url} does not answer" in capsys.readouterr().out
    for wrong in ("127.0.0.1:80", "ftp://x", "http://x/y", "http://"):
        assert "must be like http://127.0.0.1:8017" in refused(capsys, "train", config, "--teacher.url", wrong)
    assert "holds no user or password" in refused(capsys, "train", config, "--teacher.url", "http://a:b@x")


def test_a_teacher_that_does_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recorded_config(checkpoint, tmp_path)
    path = checkpoint(FAMILY, teacher=True)
    tokenizer, teacher = AutoTokenizer.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path)
    words = tokenizer.get_vocab()
    first, second = sorted(words, key=words.get)[-2:]
    swapped = {**words, first: words[second], second: words[first]}
    other = SimpleNamespace(get_vocab=lambda: swapped, eos_token=tokenizer.eos_token)
    with serving(ServedModel(teacher, other, "swapped")) as url:
        sentence = refused(capsys, "train", {**config, "teacher": {"url": url}})
        assert f"the teacher at {url}" in sentence and "must have the same tokens, but 2 ids differ" in sentence
        with pytest.raises(ConfigError, match="must have the same tokens, but 2 ids differ"):
            taught(checkpoint, tmp_path / "a", TeacherSource(url=url))
    teacher.config.vision_config.patch_size = 14
    with serving(ServedModel(teacher, tokenizer, "patches")) as url:
        sentence = refused(capsys, "train", {**config, "teacher": {"url": url}})
        assert f"the teacher at {url} reads pictures otherwise" in sentence and "patch_size 8 and 14" in sentence
    wrong = SimpleNamespace(**{**vars(model), "fingerprint": {**model.fingerprint, "protocol": 2}, "head": model.head})
    with serving(wrong) as url, pytest.raises(ConfigError, match="speaks protocol 2, expected 1"):
        TeacherClient(url).fingerprint()
    wrong.fingerprint = {**model.fingerprint, "head": "0" * 64}
    with serving(wrong) as url, pytest.raises(ConfigError, match="sends another output head than its fingerprint"):
        taught(checkpoint, tmp_path / "b", TeacherSource(url=url))


def test_weights_that_change_during_a_run(checkpoint: Checkpoint, tmp_path: Path, model: ServedModel) -> None:
    changed = SimpleNamespace(
        fingerprint=model.fingerprint,
        head=model.head,
        vocabulary=model.vocabulary,
        states=lambda body: pack(unpack(model.states(body))[0], {"weights": "another"}),
    )
    with serving(changed) as url:
        trainer = taught(checkpoint, tmp_path, TeacherSource(url=url))
        with pytest.raises(ConfigError, match="has other weights than at the start of this run"):
            outcome(trainer)


def test_the_head_is_sent_exactly(model: ServedModel) -> None:
    with serving(model) as url:
        head = TeacherClient(url).head(model.fingerprint["head"])
    assert torch.equal(head.weight, model.model.get_output_embeddings().weight)
    assert unpack_head(model.head).logit_scale == head.logit_scale == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "the teacher './nowhere' cannot be loaded"),
        (["nowhere", "--teacher", "math"], "belongs to a config with several teachers"),
        (["nowhere.yaml"], "config 'nowhere.yaml' cannot be read"),
        (["nowhere", "--device", "tpu9"], "--device 'tpu9'"),
        (["nowhere", "--port", "70000"], "expected a port from 0 to 65535, got '70000'"),
        (["nowhere", "--max-request", "0"], "expected a whole number above 0, got '0'"),
    ],
)
def test_a_command_that_cannot_serve(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve-teacher", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_serves_a_run(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Started by one command, asked by another, stopped by SIGTERM."""
    monkeypatch.chdir(tmp_path)
    config = recorded_config(checkpoint, tmp_path, on_policy_fraction=0.5)
    Path("token").write_text(TOKEN)
    teacher = str(checkpoint(FAMILY, teacher=True))
    words = [sys.executable, "-m", "vgs.cli", "serve-teacher", teacher, "--port", "0", "--token-file", "token"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"at (http://[\d.:]+), with a token\.", line)[1]
            served = {**config, "teacher": {"url": url, "token_file": "token"}}
            assert command("check", served) == 0
            assert command("train", served) == 0 and Path("run/model.safetensors").exists()
            folder = Path("cache")
            assert command("cache-teacher", served, "--out", str(folder)) == 0
            cached = {**config, "teacher": {"cache": str(folder)}}
            assert command("train", cached, "--on_policy_fraction", "0", "--output_dir", "second") == 0
            assert "refuses /fingerprint: 401" in refused(
                capsys, "train", {**served, "teacher": {"url": url}}, "--output_dir", "third"
            )
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 0
