"""The benchmark suite measures what it says: floors, float64 gradients, result files, tables, pictures, commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import vgs_from_logits, vgs_oracle
from problems import DEVICE
from torch import Tensor

from benchmarks import loss, methods, report
from benchmarks.accuracy import Exact, vds_threshold
from benchmarks.jobs import JOBS
from benchmarks.measure import is_out_of_memory, peak_extra_bytes
from benchmarks.methods import FLOOR, METHODS, Context, runner
from benchmarks.problem import SHAPES, Problem, Shape, make_problem
from benchmarks.results import Results, environment, median
from vgs_kernels import Divergence

ROOT = Path(__file__).parents[2]
TOKENS, SMALL, INPUTS = 37, Shape(311, 16, 24), loss.Inputs("cpu", "float32")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(SMALL, TOKENS, torch.float32, "cpu")


@pytest.fixture
def small_shape(monkeypatch) -> None:
    monkeypatch.setitem(SHAPES, "gate", SMALL)


def measured(problem: Problem, job: str, names: tuple[str, ...] = ("ours", "eager")) -> list[dict]:
    return loss.measure_job(problem, "gate", job, names, "cpu", rounds=3)


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "columns"),
    [
        *(("reverse-kl", 10_240), ("forward-kl", 10_240), ("jsd", 10_240)),
        *(("vgs-folded", 12_288), ("vgs-threshold", 17_613), ("vgs", 19_456)),
    ],
)
def test_floor_flops_are_those_of_the_2b_8b_table(job, columns):
    """3 Ds + Dt, 4 Ds + Dt, 4 Ds + 2 Dt + 0.3 * 2 Ds, 4 Ds + 2 Dt + 0.3 (3 Ds + Dt)."""
    shape = SHAPES["8b-2b"]
    assert JOBS[job].flops(shape, 1) == pytest.approx(2 * shape.vocab * columns, rel=1e-4)


def test_floor_takes_the_cheaper_way_to_the_language_term():
    """With a frozen head and a large teacher, masking all tokens' gradients beats projecting the gated ones again; a
    trainable head's gradient cannot be masked afterwards."""
    job = JOBS["vgs-frozen-head"]
    again, dense = job.phases(Shape(10, 1000, 1000))[1], job.phases(Shape(10, 1000, 9000))[1]
    assert (again.fraction, again.teacher) == (pytest.approx(0.3), 1)
    assert (dense.fraction, dense.teacher, dense.d_weight) == (1, 0, 0)
    assert JOBS["vgs"].phases(Shape(10, 1000, 9000))[1].teacher == 1


@pytest.mark.parametrize("plan", loss.PLANS)
def test_plans_name_what_exists_once(plan):
    cells = [(cell.shape, cell.tokens, job) for cell in loss.PLANS[plan] for job in cell.jobs]
    assert len(set(cells)) == len(cells)
    for cell in loss.PLANS[plan]:
        assert cell.shape in SHAPES and set(cell.jobs) <= set(JOBS) and {"ours", "eager"} <= set(cell.methods)
        assert set(cell.methods) <= set(METHODS)


@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if not job.dense])
def test_floor_executes_the_flops_it_claims(problem, job):
    from torch.utils.flop_counter import FlopCounterMode

    job = JOBS[job]
    run = runner(FLOOR, Context(problem, job, threshold=0.1))
    with FlopCounterMode(display=False) as counter:
        run(problem.leaves(job.trainable))
    rounding = 2 * SMALL.vocab * (3 * SMALL.student + SMALL.teacher)  # a gated share is a whole number of tokens
    assert 0 <= counter.get_total_flops() - job.flops(SMALL, TOKENS) <= rounding


def test_inputs_look_like_a_trained_pair():
    problem = make_problem(Shape(32_000, 512, 768), 128, torch.float32, "cpu")
    student, text, teacher, _ = (torch.log_softmax(x, -1) for x in problem.logits(slice(None)))
    top = student.exp().amax(-1)
    assert 0.2 < top.quantile(0.1) < 0.7 < top.median() < top.quantile(0.9) < 0.9999
    kl = (student.exp() * (student - teacher)).sum(-1)
    assert 1e-3 < kl.median() < 0.5
    dependence = (student.exp() * (student - text)).sum(-1)
    assert dependence.quantile(0.9) > 20 * dependence.quantile(0.3) > 0


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Mean over the tokens, from float64 logits; GKD (arXiv 2306.13649, Eq. 1), whose P is the teacher."""
    q, p = (torch.softmax(x, -1) for x in (student, teacher))
    if beta in (0, 1):
        x, y = (p, q) if beta == 0 else (q, p)
        return (x * (x / y).log()).sum(-1).mean()
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1).mean()


BETAS = {"forward-kl": 0.0, "jsd": 0.5, "reverse-kl": 1.0}


@pytest.mark.parametrize("name", JOBS)
def test_exact_gradients_are_the_oracles(problem, name, monkeypatch):
    job = JOBS[name]
    monkeypatch.setattr("benchmarks.accuracy._BLOCK_ELEMENTS", {"cpu": 5 * SMALL.vocab})
    leaves = problem.leaves(())
    leaves = type(leaves)(*(x.double().requires_grad_() for x in leaves.tensors))
    inputs = (leaves.student, leaves.student_text, leaves.student_weight, leaves.teacher, leaves.teacher_text)
    if job.plain:
        logits = leaves.student @ leaves.student_weight.T, leaves.teacher @ leaves.teacher_weight.T
        value = generalised_jsd(*logits, BETAS[name])
    else:
        value = vgs_oracle(*inputs, leaves.teacher_weight, objective=job.objective).loss
    measured, held = problem, leaves
    if job.dense:
        measured = problem.dense()
        rows = [x.double().requires_grad_() for x in measured.tensors]
        value = vgs_from_logits(*rows, objective=job.objective).loss
        held = type(measured)(*rows)
    threshold = vds_threshold(measured, job.objective.vds_quantile) if job.objective.lam else None
    value.backward()
    errors = Exact.of(measured, job, threshold).errors(held)
    assert set(errors) == set(job.trainable)
    assert max(errors.values()) < 1e-9


@pytest.mark.parametrize("job", JOBS)
def test_methods_agree_with_float64(problem, job):
    for row in measured(problem, job, tuple(n for n in METHODS if n != "compile" and not METHODS[n].compiles)):
        if row["method"] == FLOOR:
            assert row["gradient_errors"] == {}
        elif METHODS[row["method"]].missing("cpu") is not None:
            assert row["status"] in ("needs CUDA", "unsloth_zoo is not installed") and not row["seconds"]
        else:
            assert row["status"] == "ok", row
            assert len(row["seconds"]) == 3 and row["peak_extra_bytes"] is not None
            worst = max(row["gradient_errors"].values(), default=None)
            assert 0 < worst < 1e-3 if METHODS[row["method"]].same_loss else worst is None, row


@pytest.mark.parametrize(
    ("name", "beta"),
    [
        (name, beta)
        for name in METHODS
        for beta in (*BETAS.values(), 0.2)  # 0.5 does not tell which model beta weighs
        if METHODS[name].same_loss and not METHODS[name].compiles and (name != "liger-kl" or beta == 0)
    ],
)
def test_everyone_means_the_same_divergence(name, beta):
    """CUDA peers too: without a device through Triton's interpreter."""
    if (reason := METHODS[name].missing("cuda")) is not None:
        pytest.skip(reason)
    problem = make_problem(SMALL, TOKENS, torch.float32, DEVICE)
    job = replace(JOBS["jsd"], divergence=Divergence("jsd", beta))
    assert METHODS[name].jobs(job)
    exact = problem.leaves(())
    exact = type(exact)(*(x.double().requires_grad_() for x in exact.tensors))
    value = generalised_jsd(exact.student @ exact.student_weight.T, exact.teacher @ exact.teacher_weight.T, beta)
    value.backward()
    leaves = problem.leaves(job.trainable)
    loss = METHODS[name].make(Context(problem, job, None))(leaves)
    loss.backward()
    assert loss.item() == pytest.approx(value.item(), rel=1e-5)
    for leaf in job.trainable:
        expected = getattr(exact, leaf).grad
        assert (getattr(leaves, leaf).grad - expected).norm() < 1e-4 * expected.norm(), leaf


COMPILED = [(name, job) for name in METHODS if METHODS[name].compiles for job in BETAS]


@pytest.mark.parametrize(
    ("name", "job"),  # each compiles on its first call, which takes long: one job each by default
    [pytest.param(name, job, marks=() if job == "jsd" else pytest.mark.slow) for name, job in COMPILED],
)
@pytest.mark.slow
def test_compiled_peers_agree_with_float64(problem, job, name):
    row = measured(problem, job, (name,))[1]
    assert row["status"] == "ok" and max(row["gradient_errors"].values()) < 1e-3


def test_a_wrong_gradient_is_visible(problem, monkeypatch):
    def wrong(context):
        right = METHODS["eager"].make(context)
        return lambda x: 1.02 * right(x)

    monkeypatch.setitem(METHODS, "ours", methods.Method("2 % too large", wrong))
    errors = measured(problem, "vgs", ("ours",))[1]["gradient_errors"]
    assert all(error == pytest.approx(0.02, rel=0.01) for error in errors.values())


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_failures_are_rows(problem, monkeypatch):
    def make(error):
        def loss(x):
            raise error

        return lambda context: loss

    memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    monkeypatch.setitem(METHODS, "eager", methods.Method("a", make(memory)))
    monkeypatch.setitem(METHODS, "trl", methods.Method("b", make(KeyError("moved"))))
    monkeypatch.setitem(METHODS, "liger-jsd", methods.Method("c", make(None), package="no_such_package"))
    rows = measured(problem, "reverse-kl", ("ours", "eager", "trl", "liger-jsd"))
    status = {row["method"]: row["status"] for row in rows}
    assert status["ours"] == "ok"
    assert status["eager"] == "out of memory"
    assert status["trl"].startswith("failed: KeyError")
    assert status["liger-jsd"] == "no_such_package is not installed"


def test_out_of_memory_is_told_apart():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_a_failure_among_the_timed_calls_leaves_no_time(problem, monkeypatch):
    def make(context):
        calls = []

        def loss(x):
            calls.append(x)
            if len(calls) == 3:
                raise RuntimeError("CUDA error: out of memory")
            return METHODS["eager"].make(context)(x)

        return loss

    monkeypatch.setitem(METHODS, "trl", methods.Method("late", make))
    row = measured(problem, "reverse-kl", ("ours", "trl"))[2]
    assert row["status"] == "out of memory" and len(row["seconds"]) == 1 and median(row) is None


def test_what_cannot_be_set_up_is_named(tmp_path, monkeypatch, small_shape):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loss.Inputs, "make", fail)
    monkeypatch.setattr(loss, "ceilings", lambda device, dtype: {})
    results = Results(tmp_path / "r.json", environment("cpu"))
    assert list(loss.run([loss.Cell("gate", TOKENS, ("vgs",))], results, INPUTS, rounds=3)) == []
    assert Results.load(results.path).environment["missing"] == {f"gate N {TOKENS} vgs": "out of memory"}


def test_the_head_of_many_tokens_is_left_out_on_a_cpu(problem, monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy._HEAD_TOKENS", {"cpu": TOKENS - 1})
    row = measured(problem, "vgs", ("ours",))[1]
    assert set(row["gradient_errors"]) == {"student", "student_text"}
    assert 0 < max(row["gradient_errors"].values()) < 1e-3


def test_memory_limit_turns_a_huge_allocation_into_an_error():
    code = (
        "import torch; from benchmarks.measure import memory_limit, is_out_of_memory\n"
        "with memory_limit('cpu'):\n"
        "    try: torch.ones(1 << 38)\n"
        "    except RuntimeError as error: assert is_out_of_memory(error), error; print('caught')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "caught\n", run.stderr


def test_peak_memory_counts_what_is_freed():
    def call():
        torch.ones(16 << 20)

    peak = peak_extra_bytes(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert peak == pytest.approx(64 << 20, rel=0.1)


def test_after_the_deadline_nothing_starts_and_the_file_says_so(tmp_path, monkeypatch, small_shape):
    monkeypatch.setattr(loss, "ceilings", lambda device, dtype: {})
    results = Results(tmp_path / "r.json", environment("cpu"))
    cells = [loss.Cell("gate", TOKENS, ("vgs",))]
    assert list(loss.run(cells, results, INPUTS, rounds=3, deadline=-math.inf)) == []
    assert Results.load(results.path).environment["missing"] == {f"gate N {TOKENS} vgs": "not reached"}


# --- files, tables, pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    results = Results(tmp_path_factory.mktemp("results") / "r.json", environment("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "gate", SMALL)
        patch.setattr(loss, "ceilings", lambda device, dtype: {"flops": 1e11, "bytes_per_second": 1e10})
        cells = [loss.Cell("gate", n, methods=("ours", "eager", "trl", "liger-jsd")) for n in (TOKENS, 2 * TOKENS)]
        for rows in loss.run(cells, results, INPUTS, rounds=3):
            assert json.loads(results.path.read_text())["rows"][-len(rows) :] == rows  # written as rows come in
    return results


@pytest.mark.slow
def test_results_come_back(results):
    again = Results.load(results.path)
    assert again.rows == results.rows
    assert torch.__version__.startswith(again.environment["packages"]["torch"])  # a build's may have "+cu130" behind it
    assert not list(results.path.parent.glob("*.tmp"))


def test_bad_file_is_one_sentence(tmp_path):
    (tmp_path / "bad.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"bad\.json is not a result file"):
        Results.load(tmp_path / "bad.json")


def test_tables_show_every_row(results):
    text = report.markdown(results)
    assert text.count("\n| ours |") == text.count("\n| floor |") == 2 * len(JOBS)
    assert text.count("needs CUDA") == 2 * len(BETAS)
    assert report.summary(results).count("\n") == 2 * len(JOBS) + 1


def test_comparison_is_relative_to_each_runs_own_floor(results):
    slower = Results(None, results.environment)
    slower.rows = [{**row, "seconds": [3 * x for x in row["seconds"]]} for row in results.rows]
    assert report.compare(results, slower).count("+0.0 %") == sum(
        row["method"] != FLOOR and bool(row["seconds"]) for row in results.rows
    )
    slower.rows = [
        {**row, "seconds": [(3 if row["method"] == "ours" else 1) * x for x in row["seconds"]]} for row in results.rows
    ]
    assert report.compare(results, slower).count("+200.0 %") == 2 * len(JOBS)


def test_pictures(results, tmp_path):
    from benchmarks.plots import FIGURES, save_all

    paths = save_all(results, tmp_path)
    assert {path.stem for path in paths} == set(FIGURES)
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_can_be_read(path):
    results = Results.load(path)
    assert report.markdown(results)
    assert all(row["job"] in JOBS and (row["method"] in METHODS or row["method"] == FLOOR) for row in results.rows)
    assert any(median(row) for row in results.rows)


# --- commands -----------------------------------------------------------------------------------------------------


def test_commands(results, command):
    assert "19,456" in command("counts").out
    assert "x floor" in command("report", str(results.path)).out
    assert "+0.0 %" in command("--compare", str(results.path), str(results.path)).out
    missing = command("report", "no-such-file.json")
    assert missing.code == 1 and "no-such-file.json is not a result file" in missing.err


def test_the_module_is_a_command():
    run = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "name a command" in run.stderr


def test_loss_command_writes_a_result_file(tmp_path, command, monkeypatch):
    monkeypatch.setattr(loss, "ceilings", lambda device, dtype: {"flops": 1e11, "bytes_per_second": 1e10})
    path = tmp_path / "r.json"
    run = command(
        *("loss", "--shape", "gate", "--tokens", "16", "--jobs", "reverse-kl", "--methods", "ours", "trl"),
        *("--rounds", "3", "--out", str(path)),
    )
    assert run.code == 0 and "| gate | 16 | reverse-kl |" in run.out, run.err
    rows = {row["method"]: row for row in Results.load(path).rows}
    assert set(rows) == {FLOOR, "ours", "trl"}
    assert rows["ours"]["dtype"] == "float32" and rows["ours"]["gradient_errors"]["student"] < 1e-4
