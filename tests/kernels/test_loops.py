"""The rows in C: their functions, what is not a number, threads and forks, and how they come to be compiled."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiles import make_tile

import vgs_kernels
from vgs_kernels import divergence_loss, rows, vgs_loss
from vgs_kernels.divergence import Divergence
from vgs_kernels.rows import compile_loops, entries_torch, rows_loops, rows_torch
from vgs_kernels.rows.layout import LogitTransform, RowCoefficients, RowTile, Statistics, new_state


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked for the loops yet: a cache of its own, and a file that compiles quickly."""
    source = tmp_path / "loops.c"
    source.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(compile_loops, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (compile_loops._found, rows._of_cpu):
        cached.cache_clear()
    yield tmp_path
    for cached in (compile_loops._found, rows._of_cpu):
        cached.cache_clear()


def evaluated(x: torch.Tensor) -> list[torch.Tensor]:
    """exp(x), exp(-x) - 1 + x, expm1, log1p and tanh in C."""
    outs = [torch.empty_like(x) for _ in range(5)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, *outs)]
    compile_loops.library().functions(pointers[0], ctypes.c_int64(len(x)), *pointers[1:])
    return [out.double() for out in outs]


def ulps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units of the last place of the exact value, as a normal float32."""
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24).clamp(min=2.0**-149)
    return ((found - exact) / unit).abs().max().item()


def test_functions_against_float64():
    everywhere, near = torch.linspace(-87, 88, 300_003), torch.linspace(-0.35, 0.35, 300_002)
    tiny = torch.logspace(-30, -1, 100_003)
    assert ulps(evaluated(everywhere)[0], everywhere.double().exp()) <= 2
    for x in (near, tiny, -tiny):  # a series, where e^-x - 1 + x is below float64's own rounding
        y = -x.double()
        series = y.square() / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7)))))
        bar = torch.where(x.abs() < 0.1, 5e-7, 5e-5)
        assert bool(((evaluated(x)[1] / series - 1).abs() <= bar)[series > 1e-37].all())
    below = torch.cat([-torch.linspace(0, 90, 300_003), -tiny])
    assert ulps(evaluated(below)[2], below.double().expm1()) <= 4
    inside = torch.cat([-torch.linspace(0, 0.999999, 300_003), -tiny])
    assert ulps(evaluated(inside)[3], inside.double().log1p()) <= 4
    both = torch.cat([torch.linspace(-20, 20, 300_003), tiny, -tiny])
    assert ulps(evaluated(both)[4], both.double().tanh()) <= 4
    odd = torch.tensor([-torch.inf, -100.0, -87.5, torch.nan, 0.0])
    assert evaluated(odd)[0].nan_to_num(7).tolist() == [0, 0, 0, 7, 1]
    assert evaluated(torch.tensor([torch.inf, -torch.inf, torch.nan]))[4].nan_to_num(7).tolist() == [1, -1, 7]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 700, 1999])
@pytest.mark.parametrize("row", range(4))
def test_what_is_not_finite_is_what_it_is_in_the_specification(row, place, value):
    """In one logit of one token: the token's values and gradients, and nothing of the others'."""
    torch.manual_seed(0)
    logits = [3 * torch.randn(3, 2000) for _ in range(4)]
    logits[row][1, place] = value
    found = {}
    for backend in ("torch", "loops"):
        leaves = [x.clone().requires_grad_(i < 2) for i, x in enumerate(logits)]
        out = vgs_loss(*leaves, backend=backend, reduction="none", vds_threshold=0.1)
        out.loss[[0, 2]].sum().backward()
        gradients = [x.grad.clone() for x in leaves[:2]]
        for x in leaves[:2]:
            x.grad = None
        vgs_loss(*leaves, backend=backend, vds_threshold=0.1).loss.backward()
        found[backend] = [out.loss.detach(), out.standard, out.visual, out.vds, out.entropy, *gradients]
        found[backend] += [x.grad for x in leaves[:2]]
    if value != -torch.inf:
        assert found["torch"][0][1].isnan() and not found["loops"][0][1].isfinite()
    for ours, specified in zip(found["loops"], found["torch"], strict=True):
        torch.testing.assert_close(ours, specified, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("row", range(2))
@pytest.mark.parametrize("divergence", [{}, {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.1}], ids=str)
def test_what_is_not_finite_in_a_pair(divergence, row, value):
    """A loss of NaN with a finite gradient would pass every guard of gradient norms."""
    torch.manual_seed(0)
    logits = [3 * torch.randn(3, 2000) for _ in range(2)]
    logits[row][1, 700] = value
    found = {}
    for backend in ("torch", "loops"):
        student = logits[0].clone().requires_grad_()
        out = divergence_loss(student, [(1.0, logits[1])], backend=backend, reduction="none", **divergence)
        out.loss.sum().backward()
        found[backend] = [out.loss.detach(), student.grad]
    assert (value == -torch.inf) or found["torch"][1][1].isnan().any()
    for ours, specified in zip(found["loops"], found["torch"], strict=True):
        torch.testing.assert_close(ours, specified, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_a_library_that_others_may_write_is_not_loaded(fresh):
    folder = fresh / "cache" / "vgs_kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert compile_loops.library().answer() == 42 and not list(folder.iterdir())
    folder.chmod(0o700)
    compile_loops._found.cache_clear()
    assert compile_loops.library().answer() == 42
    (kept,) = folder.iterdir()
    kept.chmod(0o666)  # compiled anew, and replaced
    compile_loops._found.cache_clear()
    assert compile_loops.library().answer() == 42
    (kept,) = folder.iterdir()
    assert not kept.stat().st_mode & 0o022


@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("cuts", [[0, 5000], [0, 700, 701, 5000]], ids=["whole", "cut"])
def test_nearly_equal_rows_keep_their_precision(cuts, offset):
    """KLs of 1e-7 to 1e-5 nats to a thousandth, where log-sums in float32 are right to 1e-6 at best."""
    torch.manual_seed(0)
    first = 4 * torch.randn(8, 5000)
    logits = [first + 1e-3 * torch.randn(8, 5000) + offset * i for i in range(4)]
    state = new_state(8, True, torch.empty(0), rests=True)
    for start, stop in pairwise(cuts):
        rows_loops.statistics(
            RowTile(*(x[:, start:stop] for x in logits), LogitTransform(), LogitTransform(), False, stop - start), state
        )
    s, t, a, w = (x.double().log_softmax(1) for x in logits)
    found, steered = Statistics(state), (a + t - w).log_softmax(1)
    pairs = {"s_gap": (s, t), "s_view_gap": (s, a), "t_view_gap": (t, w), "a_gap": (a, w)}
    for ours, (p, q) in [*((found.kl(gap), pair) for gap, pair in pairs.items()), (found.visual, (s, steered))]:
        exact = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
        assert 1e-7 < exact.min() < exact.max() < 1e-5
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 60), max_size=4), st.booleans(), st.integers(0, 2**16))
def test_divergences_however_columns_are_cut_and_masked(cuts, four, seed):
    """Against the specification in float64: also where a row has no column yet, or none that another one has."""
    torch.manual_seed(seed)
    tile = make_tile(5, 60, four=four, masked=True)
    for row in tile[: 4 if four else 2]:
        row.masked_fill_(torch.rand(5, 60) < torch.rand(5, 1) ** 4, -torch.inf)
    state, exact = new_state(5, four, torch.empty(0), rests=True), new_state(5, four, torch.empty(0).double())
    for start, stop in pairwise([0, *sorted(cuts), 60]):
        parts = [None if x is None else x[:, start:stop] for x in tile[:4]]
        rows_loops.statistics(RowTile(*parts, *tile[4:7], readable=stop - start), state)
    rows_torch.statistics(RowTile(*(None if x is None else x.double() for x in tile[:4]), *tile[4:7], 60), exact)
    ours, specified = Statistics(state), Statistics(exact)
    gaps = ("s_gap", "s_view_gap", "t_view_gap", "a_gap") if four else ("s_gap", "t_gap")
    found = [(ours.kl(gap), specified.kl(gap)) for gap in gaps]
    if four:
        found.append((ours.visual, specified.visual))
    for value, wanted in found:
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("n", "columns"), [(0, 40), (3, 0)])
def test_no_tokens_and_no_columns(n, columns):
    """Statistics stay what they are."""
    tile, before = make_tile(max(n, 1), 41), make_tile(n, 40)
    tile = tile._replace(**{name: getattr(tile, name)[:n, :columns] for name in tile._fields[:4]})
    states = [new_state(n, True, torch.empty(0), rests=True) for _ in range(2)]
    for state, tiles in zip(states, ([before, tile], [before]), strict=True):
        for x in tiles:
            rows_loops.statistics(x, state)
    assert torch.equal(*states)


def test_rows_further_apart_than_32_bits_count():
    """Untouched memory costs nothing; what an overflowing offset would read is inside it, and 0."""
    half, n, columns, pitch = 1 << 31, 4, 64, 715_827_904  # 3 * pitch > 2^31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # promised to nobody
    logits = torch.frombuffer(mmap.mmap(-1, 8 * half + 8192, flags=flags), dtype=torch.float32)
    apart = [logits.as_strided((n, columns), (pitch, 1), half + 1024 + 128 * index) for index in range(2)]
    torch.manual_seed(0)
    for row in apart:
        row.copy_(3 * torch.randn(n, columns))
    states, gradients = [], []
    for student, target in ([row.clone() for row in apart], apart):
        tile = RowTile(student, target, None, None, LogitTransform(), LogitTransform(), False, columns)
        state = new_state(n, False, torch.empty(0))
        rows_loops.statistics(tile, state)
        coefficients = RowCoefficients(torch.ones(n), sums=torch.ones(4, n))
        rows_loops.gradient(tile, state, Divergence(), coefficients, student)  # over the logits themselves
        states.append(state)
        gradients.append(student.clone())
    assert torch.equal(*states) and torch.equal(*gradients)


@pytest.mark.parametrize("stride", [1, 2])
def test_columns_that_are_not_next_to_each_other_are_left_to_the_specification(monkeypatch, stride):
    called = []
    monkeypatch.setattr(entries_torch, "gradient", lambda *args: called.append(args))
    tile, state = make_tile(3, 41, four=False), new_state(3, False, torch.empty(0))
    rows_loops.statistics(tile, state)
    out = torch.empty(3, 41 * stride)[:, ::stride]
    rows_loops.gradient(tile, state, Divergence(), RowCoefficients(torch.ones(3), sums=torch.ones(4, 3)), out)
    assert len(called) == stride - 1


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Also where the system grants none of them, and where calls run beside each other."""
    tile, states, started = make_tile(50, 5001), [], threading.Thread.start
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        states.append(new_state(50, True, torch.empty(0)))
        rows_loops.statistics(tile, states[-1])

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "vgs_kernels":
            raise RuntimeError("can't start new thread")
        started(thread)

    others = [new_state(50, True, torch.empty(0)) for _ in range(3)]
    threads = [threading.Thread(target=rows_loops.statistics, args=(tile, state)) for state in others[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    rows_loops.statistics(tile, others[2])
    assert all(torch.equal(states[0], state) for state in (states[1], *others))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_go_on(monkeypatch):
    """As the workers of a DataLoader: OpenMP's threads are lost in a fork, and waiting for them never ends."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tile, state = make_tile(50, 5001), new_state(50, True, torch.empty(0))
    rows_loops.statistics(tile, state)
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def child() -> None:
        again = new_state(50, True, torch.empty(0))
        rows_loops.statistics(tile, again)
        queue.put(torch.equal(again, state))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and queue.get()


def test_compiled_callers_and_fake_tensors_see_one_operator():
    """``"auto"`` is resolved inside it: tracing asks for no compiler."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8)
    target = [(1.0, torch.randn(5, 4), torch.randn(50, 4))]

    def loss(x):
        return vgs_kernels.fused_linear_divergence(x, weight, target).loss

    eager = loss(hidden)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(eager, compiled) and torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (eager, compiled)))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(hidden)).shape == ()
    meta = [(1.0, *(x.to("meta") for x in target[0][1:]))]
    assert vgs_kernels.fused_linear_divergence(hidden.to("meta"), weight.to("meta"), meta).loss.device.type == "meta"


def test_nothing_is_compiled_before_it_is_needed(tmp_path):
    code = "import vgs_kernels, sys; print([m for m in sys.modules if 'loops' in m])"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def test_kept_for_the_next_process(fresh, monkeypatch):
    """For this processor and these flags; another one has a library of its own."""
    assert compile_loops.library().answer() == 42
    (kept,) = (fresh / "cache/vgs_kernels").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compile_loops, "_built", None)  # not asked for
        assert compile_loops._load().answer() == 42
    for name, value in {"_processor": lambda: "another", "_FLAGS": [*compile_loops._FLAGS, "-O2"]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(compile_loops, name, value)
            assert compile_loops._load().answer() == 42
    assert len(list(kept.parent.iterdir())) == 3


def test_a_torn_library_is_built_again(fresh):
    compile_loops._load()
    (kept,) = (fresh / "cache/vgs_kernels").iterdir()
    whole = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(whole[:100])
    assert compile_loops._load().answer() == 42 and len(kept.read_bytes()) == len(whole)


@pytest.mark.slow
def test_several_processes_at_once(fresh):
    code = (
        "import pathlib, sys; from vgs_kernels.rows import compile_loops as c; c._SOURCE = pathlib.Path(sys.argv[1]);"
        "assert c.library().answer() == 42"
    )
    command = [sys.executable, "-c", code, str(fresh / "loops.c")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(list((fresh / "cache/vgs_kernels").iterdir())) == 1


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    """A file in the place of the folder, for root may write anywhere."""
    (fresh / "cache").write_text("")
    assert compile_loops.library().answer() == 42


@pytest.mark.parametrize("given", ["", "no-such-compiler", "false", shlex.join([sys.executable, "-c", "exit(1)"])])
def test_without_a_compiler(fresh, monkeypatch, given):
    """The specification takes the loops' place, which is said once; only who names the loops gets an error."""
    monkeypatch.setenv("CC", given)
    if not given:
        monkeypatch.setattr(compile_loops.shutil, "which", lambda name: None)
    logits = [torch.randn(2, 9, requires_grad=i < 2) for i in range(4)]
    with pytest.warns(UserWarning, match="could not be compiled .* CC helps") as caught:
        values = [vgs_loss(*logits, vds_threshold=0.1).loss for _ in range(2)]
    assert len([w for w in caught if "compiled" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(vgs_loss(*logits, vds_threshold=0.1, backend="torch").loss, values[0])
    with pytest.raises(ValueError, match=r"^backend='loops' needs a C compiler"):
        vgs_loss(*logits, backend="loops")


def test_a_source_that_does_not_compile(fresh):
    (fresh / "loops.c").write_text("int answer(void) { return no_such_name; }\n")
    with pytest.raises(compile_loops.CannotCompile, match=r"error:.*no_such_name"):
        compile_loops.library()


@pytest.mark.parametrize("double", [True, False])
def test_where_loops_cannot_run(double):
    x = torch.randn(2, 9, dtype=torch.float64) if double else torch.randn(2, 9).to("meta")
    if double:
        with pytest.raises(ValueError, match=r"^backend='loops' is for .* a CPU, got torch\.float64"):
            vgs_loss(x, x, x, x, backend="loops")
    else:
        assert vgs_loss(x, x, x, x, backend="loops").loss.device.type == "meta"
