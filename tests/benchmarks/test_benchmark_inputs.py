"""What losses are measured on: rows of an entropy, captured ones, a busy core, first calls; and heads of every form."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import vgs_oracle
from safetensors.torch import save_file

from benchmarks import first_call, loss, report
from benchmarks.accuracy import Exact, vds_threshold
from benchmarks.jobs import JOBS
from benchmarks.measure import busy_core
from benchmarks.methods import FLOOR, METHODS
from benchmarks.problem import PLAIN, Form, Problem, Shape, make_problem
from benchmarks.results import ROOT, Results
from benchmarks.rows import Inputs

SHAPE, TOKENS, TEMPERATURE = Shape(311, 16, 24), 37, 2.0
FORMS = Form(torch.linspace(-1, 1, SHAPE.vocab), 1.5, 8.0), Form(torch.linspace(1, -1, SHAPE.vocab), 0.5, 6.0)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(SHAPE, TOKENS, torch.float32, "cpu")


@pytest.fixture(scope="module")
def captured(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as ``vgs capture`` writes it, with heads of every form."""
    path = tmp_path_factory.mktemp("rows") / "mine.safetensors"
    names = ("student", "student_text", "teacher", "teacher_text", "student_weight", "teacher_weight")
    tensors = dict(zip(names, problem.tensors, strict=True))
    notes = {"kind": "rows of the loss", "form": 1, "config": "c0ffee" * 8, "tokens": TOKENS, "one_head": False}
    for model, form in zip(("student", "teacher"), FORMS, strict=True):
        tensors[f"{model}_bias"] = form.bias
        notes[model] = {"name": f"a/{model}", "scale": form.scale, "softcap": form.softcap}
    save_file(tensors, path, {"notes": json.dumps({**notes, "temperature": TEMPERATURE})})
    return path


def test_rows_of_an_entropy(nats=1.2):
    """Which every table shows; the tolerance is a method of their own, and these rows have something to leave out."""
    problem = make_problem(Shape(8000, 64, 96), 64, torch.float32, "cpu", nats=nats)
    rows = loss.measure_job(problem, "gate", "reverse-kl", ("tolerance-1e-2",), "cpu", rounds=3)
    assert rows[0]["entropy"] == pytest.approx(nats, abs=0.05)
    assert 1e-5 < max(rows[1]["gradient_errors"].values()) < 1e-2
    (results := Results(None, {})).add(*rows)
    assert f"rows of {nats:.1f} nats" in report.tables(results)


@pytest.fixture
def formed(problem: Problem) -> Problem:
    """The problem with heads of every form."""
    return replace(problem, student_form=FORMS[0], teacher_form=FORMS[1])


def test_exact_gradients_go_through_every_form_of_a_head(formed):
    objective = JOBS["vgs"].objective
    student, text, teacher, teacher_text, *weights = (x.double().requires_grad_() for x in formed.tensors)
    options = {}
    for model, form in zip(("student", "teacher"), FORMS, strict=True):
        options[f"{model}_bias"] = form.bias.double()
        options |= {f"{model}_softcap": form.softcap, f"{model}_logit_scale": form.scale}
    rest = (weights[0], teacher, teacher_text, weights[1])
    vgs_oracle(student, text, *rest, objective=objective, **options).loss.backward()
    exact = Exact.of(formed, JOBS["vgs"], vds_threshold(formed, objective.vds_quantile))
    assert max(exact.errors(Problem(student, text, teacher, teacher_text, *weights)).values()) < 1e-9


def test_given_logits_have_their_heads_forms(formed):
    for given, wanted in zip(formed.dense().tensors, formed.logits(slice(None)), strict=True):
        torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("job", ["vgs", "vgs-logits", "reverse-kl", "jsd"])
def test_methods_know_every_form_of_a_head_or_say_so(formed, job):
    names = tuple(name for name in METHODS if not METHODS[name].compiles or not METHODS[name].every_head)
    for row in loss.measure_job(formed, "gate", job, names, "cpu", rounds=3):
        method = METHODS.get(row["method"])
        if method is not None and not method.every_head:
            assert row["status"] == "takes no head with bias, scale and soft-cap" and not row["seconds"]
        elif method is not None and method.missing("cpu") is None:
            bound = 2e-2 if row["method"] == "tolerance-1e-2" else 2e-3 if row["method"] == "tolerance-1e-3" else 1e-4
            assert row["status"] == "ok" and 0 < max(row["gradient_errors"].values()) < bound, row


@pytest.mark.slow
def test_a_compiled_method_knows_every_form_of_a_head(formed):
    row = loss.measure_job(formed, "gate", "vgs", ("compile",), "cpu", rounds=3)[1]
    assert row["status"] == "ok" and max(row["gradient_errors"].values()) < 1e-4


def test_captured_rows_are_those_of_the_file(formed, captured):
    inputs = Inputs("cpu", "float32", captured=str(captured))
    found = inputs.make("mine", 9)
    assert [len(x) for x in found.tensors] == [9, 9, 9, 9, SHAPE.vocab, SHAPE.vocab]
    for given, wanted in zip(found.logits(slice(None)), formed.logits(slice(0, 9)), strict=True):
        torch.testing.assert_close(given, wanted / TEMPERATURE)
    assert found.leaves(("student",)).forms == found.rotated(3).forms == found.forms != (PLAIN, PLAIN)
    assert inputs.make("mine", TOKENS).student.dtype == torch.float32


def test_one_head_is_both(problem, tmp_path):
    tensors = {name: getattr(problem, name).clone() for name in ("student", "student_text", "student_weight")}
    tensors |= {"teacher": problem.student.flip(0), "teacher_text": problem.student_text.flip(0)}
    notes = {"kind": "rows of the loss", "form": 1, "config": "0" * 64, "tokens": TOKENS, "one_head": True}
    notes |= {model: {"name": "a", "scale": 1.0, "softcap": None} for model in ("student", "teacher")}
    save_file(tensors, tmp_path / "r.safetensors", {"notes": json.dumps({**notes, "temperature": 1.0})})
    found = Inputs("cpu", "float32", captured=str(tmp_path / "r.safetensors")).make("r", TOKENS)
    assert torch.equal(found.teacher_weight, found.student_weight) and found.forms == (PLAIN, PLAIN)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(loss, "ceilings", lambda device, dtype: {"flops": 1e11, "bytes_per_second": 1e10})


def test_the_command_measures_captured_rows_beside_a_busy_core(captured, command, quick, tmp_path):
    out, rows = tmp_path / "r.json", ("--rows", str(captured), "--jobs", "reverse-kl", "--methods", "ours", "eager")
    done = command("loss", *rows, "--tokens", "16", "--rounds", "3", "--busy-core", "--out", str(out))
    assert done.code == 0, done.err
    assert "mine (V 311, Ds 16, Dt 24), N 16" in done.out
    assert "nats (captured: a/student, taught by a/teacher, config c0ffeec0ffee)" in done.out
    assert "one core kept busy by another process" in done.out
    results = Results.load(out)
    assert {row["method"]: row["status"] for row in results.rows} == {FLOOR: "ok", "ours": "ok", "eager": "ok"}
    assert 0 < results.environment["load"]["share"] <= 1.05
    assert f"(which had {results.environment['load']['share']:.2f} of it)" in command("report", str(out)).out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tokens", "38"), "--tokens must be at most 37, the tokens of"),
        (("--shape", "gate"), "--rows has a shape and an entropy of its own"),
        (("--entropy", "1.2"), "--rows has a shape and an entropy of its own"),
    ],
)
def test_what_captured_rows_exclude(captured, command, options, sentence):
    done = command("loss", "--rows", str(captured), *options)
    assert done.code == 1 and sentence in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("notes", [None, {"kind": "another", "form": 1}, {"kind": "rows of the loss", "form": 2}])
def test_other_files_are_refused(command, tmp_path, notes):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, None if notes is None else {"notes": json.dumps(notes)})
    for given in (path, tmp_path / "none"):
        done = command("loss", "--rows", str(given))
        assert done.code == 1 and f"--rows must be a file of vgs capture, got {given}" in done.err


# --- the load and first calls -------------------------------------------------------------------------------------


def test_a_busy_core_ends_with_an_error_and_with_its_parent():
    code = (
        "import os, time; from benchmarks.measure import busy_core\n"
        "with busy_core():\n"
        "    print(next(x for x in os.listdir('/proc') if x.isdigit() and "
        "open(f'/proc/{x}/stat').read().rsplit(')', 1)[1].split()[1] == str(os.getpid())), flush=True)\n"
        "    os._exit(0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    child, deadline = Path("/proc", run.stdout.strip()), time.monotonic() + 60
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.stdout.strip().isdigit() and not child.exists(), run.stderr
    with pytest.raises(KeyError), busy_core() as load:
        raise KeyError
    assert load["share"] is not None


def test_first_calls_have_a_process_each(captured, monkeypatch):
    calls = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command) or run(command, **options))
    inputs = Inputs("cpu", "float32", captured=str(captured))
    rows = first_call.first_calls(inputs, "mine", 16, "reverse-kl", ("eager", "liger-jsd"), rounds=2)
    methods = [json.loads(command[-1])["method"] for command in calls]
    assert methods == [FLOOR, "eager", "liger-jsd", FLOOR, "eager"]  # what cannot run is asked once
    assert [(row["method"], row["status"], len(row["seconds"])) for row in rows[:2]] == [
        (FLOOR, "ok", 2),
        ("eager", "ok", 2),
    ]
    assert rows[2]["status"] == "takes no head with bias, scale and soft-cap" and not rows[2]["seconds"]
    (results := Results(None, {"disk_caches": {"triton": 3}})).add(*rows)
    assert "first calls of fresh processes (files in caches on disk before: triton 3)" in report.tables(results)


def test_a_process_that_dies_is_a_row(captured, monkeypatch):
    row = {"method": FLOOR, "status": "ok", "seconds": [1.0], "vocab": 311}

    def run(command, **options):
        dead = json.loads(command[-1])["method"] != FLOOR
        return subprocess.CompletedProcess(command, -9 if dead else 0, json.dumps(row), "killed")

    monkeypatch.setattr(subprocess, "run", run)
    inputs = Inputs("cpu", "float32", captured=str(captured))
    rows = first_call.first_calls(inputs, "mine", 16, "jsd", ("ours",), rounds=1)
    assert rows[1] == {**row, "method": "ours", "status": "failed: exit status -9", "seconds": []}


def test_the_command_states_what_was_cached(captured, command, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(first_call, "first_calls", lambda inputs, *cell, rounds: [])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "one").write_text("")
    done = command("loss", "--rows", str(captured), "--first-call", "--jobs", "jsd", "--out", str(tmp_path / "r.json"))
    assert done.code == 0 and Results.load(tmp_path / "r.json").environment["disk_caches"]["triton"] == 1
