"""The step suite: all methods take the same step, its phases are measured, its counts are those of what runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from allocations import AllocationMeter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step, step_counts, step_methods, step_report
from benchmarks.jobs import JOBS
from benchmarks.methods import METHODS as LOSSES
from benchmarks.methods import Context
from benchmarks.problem import SHAPES, Shape, make_problem
from benchmarks.results import Results, environment
from benchmarks.step_methods import METHODS, PHASES, unmeasured
from benchmarks.step_problem import PAIRS, SINGLE, TOYS, Load, make_groups

SHARING = step.PLANS["small"][1]


@pytest.fixture(scope="module")
def small() -> step.Step:
    return step.make_step(SHARING, "cpu", torch.float32)


def gradients(small: step.Step, name: str) -> tuple[float, list[torch.Tensor]]:
    small.student.zero_grad()
    loss = METHODS[name].run(METHODS[name], small, unmeasured).item()
    return loss, [parameter.grad.clone() for parameter in small.student.parameters()]


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (("plain", "plain-shared"), {}),
        (("vgs-naive", "vgs", "vgs-shared"), {}),
        (("vgs", "vgs-shared"), {"lam": 0.0}),
    ],
)
def test_methods_take_the_same_gradient(small, monkeypatch, names, changed):
    for name in names:
        method = METHODS[name]
        monkeypatch.setitem(METHODS, name, replace(method, objective=replace(method.objective, **changed)))
    expected, reference = gradients(small, names[0])
    for name in names[1:]:
        loss, found = gradients(small, name)
        assert loss == pytest.approx(expected, rel=1e-5)
        for got, want in zip(found, reference, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * want.abs().max().item() + 1e-8)


@pytest.mark.parametrize("pair", ["small-qwen3.5", "small-gemma4"])
@pytest.mark.slow
def test_stacks_of_several_kinds_of_layers_take_the_same_step(pair):
    (cell,) = step.PLANS[pair]
    entries = step.measure_cell(step.make_step(cell, "cpu", torch.float32), cell.methods, 1, 1e-4)
    assert {name: entry.status for name, entry in entries.items()} == dict.fromkeys(cell.methods, "ok")


def test_passes_add_up_to_the_step(small):
    """Two prompts a step: the gate's threshold and the weights are of all of them."""
    load = replace(TOYS["small"][4], prompts=2)
    groups = step.add_pixels(make_groups(load, small.student.config), small.student.config, "cpu")
    whole = replace(small, batches=[groups])
    cut = replace(small, batches=[groups[:1], groups[1:]])
    (loss, together), (total, apart) = gradients(whole, "vgs-shared"), gradients(cut, "vgs-shared")
    assert total == pytest.approx(loss, rel=1e-5)
    for got, want in zip(apart, together, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * want.abs().max().item() + 1e-8)


def test_every_plan_names_what_exists_once():
    for plan in step.PLANS.values():
        cells = [(cell.pair, cell.job) for cell in plan]
        assert len(set(cells)) == len(cells)
        assert all(cell.pair in PAIRS and set(cell.methods) <= set(METHODS) for cell in plan)
        assert all(cell.load.micro_batch % cell.load.generations == 0 for cell in plan)


def test_models_are_the_published_sizes():
    student, teacher = step_counts.sizes("8b-2b")
    assert (student.text.hidden, teacher.text.hidden, student.vocabulary) == (2048, 4096, SHAPES["8b-2b"].vocab)
    assert [round(size.parameters / 1e8) for size in (student, teacher)] == [21, 88]


# --- result files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    results = Results(tmp_path_factory.mktemp("step") / "r.json", environment("cpu"))
    cells = [replace(SHARING, methods=("plain", "vgs-shared"))]
    for rows in step.run(cells, results, "cpu", torch.float32, rounds=2):
        assert json.loads(results.path.read_text())["rows"][-len(rows) :] == rows
    return results


def test_rows_hold_every_phase(results):
    rows = {row["method"]: row for row in Results.load(results.path).rows}
    assert set(rows) == {step.ROLLOUT, "plain", "vgs-shared"}
    for name in ("plain", "vgs-shared"):
        row = rows[name]
        assert row["status"] == "ok" and len(row["seconds"]) == 2
        assert set(row["phase_seconds"]) == set(PHASES) == set(row["phase_peak_bytes"])
        assert sum(times[0] for times in row["phase_seconds"].values()) == pytest.approx(row["seconds"][0])
        assert 0 < row["peak_extra_bytes"] < 2**30
    sampling = rows[step.ROLLOUT]
    assert sampling["sampled"] == sampling["longest"] and 0 < sampling["prefill_seconds"] < sampling["seconds"][0]
    assert sampling["computed_seconds"] == pytest.approx(sampling["seconds"][0])


def test_tables_and_picture(results, tmp_path):
    text = step_report.markdown(results)
    for name in ("plain", "vgs-shared"):
        assert f"\n| {METHODS[name].title} | " in text
    assert "measured in full" in text and "targets" not in text
    from benchmarks.plots import stacked_phases

    stacked_phases(step_report.panels(results), "seconds", "caption").savefig(tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_a_partial_rollout_is_labelled_as_computed():
    row = {"status": "ok", "seconds": [6.6], "sampled": 64, "sequences": 8, "longest": 2000, "computed_seconds": 200.3}
    line = step_report._rollout_line(row)
    assert "6.60 s for 64 tokens of 8 sequences (78 tokens/s" in line
    assert "computed from this for the longest response of 2,000: 200.30 s" in line


def test_targets_say_what_is_missed():
    alone = {"plain": 1.0, "vgs": 1.25, "vgs-naive": 1.5}
    lines = step_report.targets(alone, {}, {"vgs": 1, "vgs-naive": 4}).splitlines()[2:]
    assert [line.split("|")[3:6] for line in lines] == [
        [" 1.25 ", " <= 1.30 ", " met "],
        [" 1.20 ", " >= 1.50 ", " missed "],
        [" 0.25 ", " <= 0.50 ", " met "],
    ]


# --- what goes wrong ----------------------------------------------------------------------------------------------


def failing(error: Exception):
    def run(method, step, phase):
        raise error

    return run


def test_failures_and_wrong_results_are_rows(small, monkeypatch):
    right = METHODS["vgs-shared"]
    memory = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setitem(METHODS, "vgs", replace(right, run=failing(memory)))
    monkeypatch.setitem(METHODS, "plain", replace(METHODS["plain"], run=failing(KeyError("moved"))))
    wrong = replace(right, run=lambda method, step, phase: 1.001 * right.run(right, step, phase))
    monkeypatch.setitem(METHODS, "vgs-shared", wrong)
    entries = step.measure_cell(small, ("plain", "vgs-naive", "vgs", "vgs-shared"), 1, 1e-4)
    assert entries["vgs"].status == "out of memory" and not entries["vgs"].seconds
    assert entries["plain"].status.startswith("failed: KeyError")
    assert entries["vgs-shared"].status.startswith("failed: loss") and "vgs-naive has" in entries["vgs-shared"].status
    assert entries["vgs-naive"].status == "ok" and len(entries["vgs-naive"].seconds) == 1


def test_a_pair_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "make_step", lambda *arguments: torch.empty(1 << 50))
    results = Results(tmp_path / "r.json", environment("cpu"))
    (rows,) = step.run([SHARING], results, "cpu", torch.float32, rounds=1)
    assert {row["status"] for row in rows} == {"out of memory"} and len(rows) == len(SHARING.methods)
    assert not results.environment["missing"]


def test_after_the_deadline_nothing_starts(tmp_path):
    results = Results(tmp_path / "r.json", environment("cpu"))
    assert list(step.run([SHARING], results, "cpu", torch.float32, rounds=1, deadline=-math.inf)) == []
    assert Results.load(results.path).environment["missing"] == {"small G4": "not reached"}


@pytest.mark.parametrize(
    ("limit", "fits", "fails"), [(300, 0, 512), (700, 512, 1024), (5000, 4608, 5120), (10**9, 65_536, None)]
)
def test_longest_response_is_bisected(monkeypatch, limit, fits, fails):
    def run(method, step, phase):
        if max(step.batches[0][0].response_lengths) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(METHODS, "plain", replace(METHODS["plain"], run=run))
    group = make_groups(TOYS["small"][4], PAIRS["small"][0]())
    student, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
    fake = step.Step(student, teacher, [group], "cpu", None, torch.optim.SGD(student.parameters()))
    row = step.longest_response(fake, "plain")
    assert (row["fits"], row["fails"], row["stopped"]) == (fits, fails, False)
    stopped = step.longest_response(fake, "plain", deadline=-math.inf)
    assert (stopped["fits"], stopped["stopped"]) == (0, True)


# --- counts -------------------------------------------------------------------------------------------------------


def test_views_count_rows_and_pairs():
    """Two responses (3 and 5 tokens) to a prompt of 4 text tokens and 7 in all."""
    load = Load(1, 2, 2, (2, 2), 4, 3, 5)
    groups = make_groups(load, PAIRS["small"][0]())
    lengths = torch.ones(3, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    batch = [replace(groups[0], responses=lengths)]
    assert len(batch[0].prompt_ids) == 7
    padded, packed, shared = (
        step_counts.view(METHODS[name], batch, text=False, patches=4) for name in ("plain", "vgs", "vgs-shared")
    )
    assert (padded.tokens, padded.pairs, padded.images) == (2 * 12, 2 * 78, (4, 4))
    assert (packed.tokens, packed.pairs, packed.images) == (9 + 11, 45 + 66, (4, 4))
    assert (shared.tokens, shared.pairs, shared.images) == (7 + 2 + 4, 28 + (3 + 14) + (10 + 28), (4,))
    text = step_counts.view(METHODS["vgs-shared"], batch, text=True, patches=4)
    assert (text.tokens, text.images) == (4 + 2 + 4, ())


@pytest.mark.parametrize("name", step_methods.differing(4))
def test_counted_flops_are_executed(small, name, monkeypatch):
    """Matrix products of a step; attention aside, which is no operator of its own on a CPU, and the fused losses, whose
    products no counter sees. Recomputing a layer stops before its last product."""
    sizes = [
        replace(size, text=replace(size.text, query=0), tower=replace(size.tower, query=0))
        for size in step_counts.sizes("small")
    ]
    eager = step_counts.head_phases(METHODS[name]) if name == "vgs-naive" else {}
    monkeypatch.setattr(step_counts, "sizes", lambda pair: sizes)
    monkeypatch.setattr(step_counts, "head_phases", lambda method: eager)
    monkeypatch.setattr(step_methods, "plain_loss_name", lambda device: "ours")
    METHODS[name].run(METHODS[name], small, unmeasured)  # asks the family how it may be run
    small.student.zero_grad()
    with FlopCounterMode(display=False) as counter:
        METHODS[name].run(METHODS[name], small, unmeasured)
    products = ("aten.mm", "aten.addmm", "aten.convolution", "aten.convolution_backward")
    executed = sum(value for op, value in counter.get_flop_counts()["Global"].items() if str(op) in products)
    counted = sum(step_counts.flops(METHODS[name], SHARING.load, "small").values())
    assert executed < counted < 1.06 * executed


@pytest.mark.parametrize("pair", ["small-qwen3.5", "small-gemma4"])
@pytest.mark.parametrize("name", ["plain", "vgs-shared"])
def test_counted_flops_of_hybrids_are_executed(pair, name, monkeypatch):
    """As above; the products of the delta rule are batched, and left out here."""
    (cell,) = step.PLANS[pair]
    sizes = [replace(size, attention=(), rule=0, tower_query=0) for size in step_counts.sizes(pair)]
    monkeypatch.setattr(step_counts, "sizes", lambda pair: sizes)
    monkeypatch.setattr(step_counts, "head_phases", lambda method: {})
    monkeypatch.setattr(step_methods, "plain_loss_name", lambda device: "ours")
    made = step.make_step(cell, "cpu", torch.float32)
    METHODS[name].run(METHODS[name], made, unmeasured)  # asks the family how it may be run
    with FlopCounterMode(display=False) as counter:
        METHODS[name].run(METHODS[name], made, unmeasured)
    products = ("aten.mm", "aten.addmm")
    executed = sum(value for op, value in counter.get_flop_counts()["Global"].items() if str(op) in products)
    counted = sum(step_counts.flops(METHODS[name], cell.load, pair).values())
    assert 0.95 * executed < counted < 1.1 * executed


def test_heads_are_those_of_the_2b_8b_table():
    """Columns a token: plain 10,240, naive 6 Ds + 2 Dt, folded 12,288, ours 17,613 behind a gate of 2 Dt."""
    shape = SHAPES["8b-2b"]
    columns = {
        name: sum(phase.columns(shape) for part in step_counts.head_phases(method).values() for phase in part)
        for name, method in METHODS.items()
    }
    assert columns["plain"] == columns["plain-shared"] == 10_240
    assert columns["vgs-naive"] == 6 * 2048 + 2 * 4096
    assert columns["vgs-shared-lam0"] == 12_288
    assert columns["vgs"] == columns["vgs-shared"] == pytest.approx(17_613 + 8192, abs=1)


def test_eager_keeps_what_is_counted():
    tokens, vocab = 64, 4096
    problem = make_problem(Shape(vocab, 16, 24), tokens, torch.float32, "cpu")
    leaves = problem.leaves(JOBS["vgs"].trainable)
    loss = LOSSES["eager"].make(Context(problem, JOBS["vgs"], None))
    with AllocationMeter() as meter, torch.autocast("cpu", torch.bfloat16):
        loss(leaves).backward()
    assert meter.peak == pytest.approx(step_counts.EAGER_BYTES * tokens * vocab, rel=0.1)


def test_largest_fits():
    assert step_counts.largest(lambda x: x <= 1000, 4096, 256) == 768
    assert step_counts.largest(lambda x: True, 4096, 256) == 4096
    assert step_counts.largest(lambda x: False, 4096, 256) == 0


@pytest.mark.parametrize("offloaded", [False, True])
def test_longest_response_fills_the_memory(offloaded):
    memory, method = 132 * 2.0**30, METHODS["vgs-naive"]
    longest = step_counts.longest_response(method, SINGLE, "8b-2b", memory, offloaded=offloaded)

    def needed(length: int) -> int:
        load = replace(SINGLE, shortest=length, longest=length)
        return step_counts.peak_bytes(method, load, "8b-2b", offloaded=offloaded)

    assert needed(longest) <= memory < needed(longest + 256)


def test_an_offloaded_teacher_is_whole_in_its_own_phase():
    student, teacher = step_counts.sizes("8b-4b")
    needed = [step_counts.peak_bytes(METHODS["vgs"], SINGLE, "8b-4b", offloaded=x) for x in (False, True)]
    assert 16 * student.parameters + 2 * teacher.parameters < needed[1] < needed[0]


# --- commands -----------------------------------------------------------------------------------------------------


def test_counts_say_that_nothing_was_measured(command):
    text = command("step", "--count", "--pairs", "8b-2b").out
    assert text.startswith("**Computed, not measured.**")
    assert text.count("TFLOP by phase") == 2 and "**Longest response that fits**" in text
    assert "does not fit" in text


@pytest.mark.slow
def test_small_command_and_report(tmp_path, command):
    path = tmp_path / "r.json"
    text = command("step", "--small", "--rounds", "1", "--out", str(path), "--plots", str(tmp_path)).out
    assert {row["status"] for row in Results.load(path).rows} == {"ok"} and (tmp_path / "step.png").exists()
    report = command("report", str(path)).out
    for table in (text, report):
        assert table.count("| VGS, packed, prefix shared |") == 1
