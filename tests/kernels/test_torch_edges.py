"""The losses inside PyTorch: operator checks, tensors without numbers, one graph, inference mode, devices' dtypes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from problems import DEVICE, TRAINABLE, make_problem
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    operators,
    vgs_loss,
)
from vgs_kernels.rows import layout

SETTING = VGSObjective(lam=0.5)


def calls(problem):
    """A call of every kind, for both operators."""
    s, a, head, t, w, teacher = problem.args()
    ids, logits = problem.target_ids, [x @ y.T for x, y in ((s, head), (a, head), (t, teacher), (w, teacher))]
    rows = [(1.0, t, teacher), (0.5, w, teacher)]
    policy = PolicyTerm(torch.ones_like(s[:, 0]), torch.ones_like(s[:, 0]))
    steered = {"objective": SETTING, "target_ids": ids, "backend": "torch"}
    sampled = {"divergence": "sampled_reverse_kl", "target_ids": ids, "backend": "torch"}
    adaptive = VGSObjective(lam=0.5, schedule="adaptive", detach_prior=False)
    folded = {"objective": VGSObjective(lam=0.0), "return_terms": False, "backend": "torch"}
    return {
        "vgs": lambda: fused_linear_vgs_loss(*problem.args(), policy=policy, **steered),
        "vgs, adaptive, unreduced": lambda: fused_linear_vgs_loss(
            *problem.args(), objective=adaptive, reduction="none", backend="torch"
        ),
        "vgs, threshold": lambda: fused_linear_vgs_loss(*problem.args(), vds_threshold=0.1, **steered),
        "vgs, folded": lambda: fused_linear_vgs_loss(*problem.args(), **folded),
        "vgs of logits": lambda: vgs_loss(*logits, **steered),
        "divergence": lambda: fused_linear_divergence(s, head, rows, backend="torch"),
        "divergence, unreduced": lambda: fused_linear_divergence(s, head, rows, backend="torch", reduction="none"),
        "divergence, sampled": lambda: fused_linear_divergence(s, head, rows, **sampled),
        "divergence, top-k": lambda: fused_linear_divergence(
            s, head, rows, support="student_top_k", top_k=5, divergence="forward_kl", backend="torch"
        ),
        "divergence of logits": lambda: divergence_loss(
            logits[0], [(1.0, logits[2])], divergence="jsd", target_ids=ids, backend="torch"
        ),
    }


CALLS = list(calls(make_problem(2, 5)))


def operator_call(monkeypatch, name, problem):
    """The operator of a call, and what it was given."""
    found = []
    for operator in ("loss", "synchronising_loss"):
        original = getattr(operators, operator)

        def record(*args, original=original):
            found.append((original, args))
            return original(*args)

        monkeypatch.setattr(operators, operator, record)
    calls(problem)[name]()
    monkeypatch.undo()
    return found[0]


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(monkeypatch, name):
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes."""
    operator, (student, *rest) = operator_call(monkeypatch, name, make_problem(5, 57).leaves(TRAINABLE[:3]))
    assert operator is (operators.synchronising_loss if name == "vgs, threshold" else operators.loss)
    found = torch.library.opcheck(operator, ([x.detach().requires_grad_() for x in student], *rest))
    assert set(found.values()) == {"SUCCESS"} and "test_aot_dispatch_dynamic" in found


class NoFloat64(TorchDispatchMode):
    """Raises where float64 is computed with."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (list, tuple)) else [out]
        double = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in results)
        assert not double, f"{function} gives float64"
        return out


@pytest.mark.parametrize("name", CALLS)
def test_devices_without_float64(monkeypatch, name):
    """Nothing asks for it between the operator's arguments and its results, which stay as they were."""
    problem = make_problem(7, 57)
    args = operator_call(monkeypatch, name, problem.leaves(TRAINABLE[:3]))[1]
    with torch.no_grad():
        expected = operators.run(*args)
    for module in (layout, __import__("vgs_kernels.gating").gating):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    with torch.no_grad(), NoFloat64():
        found = operators.run(*args)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-6)
    with pytest.raises(AssertionError, match="float64"), torch.no_grad(), NoFloat64():
        problem.student_hidden.double()


def test_the_gate_without_float64(monkeypatch):
    problem = make_problem(7, 57)
    expected = fused_linear_vgs_loss(*problem.args(), objective=SETTING)
    for module in (layout, __import__("vgs_kernels.gating").gating):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    assert torch.equal(fused_linear_vgs_loss(*problem.args(), objective=SETTING).gate, expected.gate)


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_without_numbers(mode):
    problem = make_problem(5, 57, device="cpu")
    plain = [call() for call in calls(problem).values()]
    if mode == "meta":
        found = [call() for call in calls(problem.to(device="meta")).values()]
    else:
        with FakeTensorMode() as fake:
            values = {name: x if x is None else fake.from_tensor(x) for name, x in vars(problem).items()}
            found = [call() for call in calls(replace(problem, **values)).values()]
    for ours, expected in zip(found, plain, strict=True):
        for name, value in vars(expected).items():
            got = getattr(ours, name) if name != "counted" else value  # nobody looks whether a token is ignored
            assert (got is None) == (value is None), name
            assert value is None or (got.shape, got.dtype) == (value.shape, value.dtype), name


@pytest.mark.parametrize("what", ["setting", "number", "divergence"])
def test_numbers_that_change_are_one_graph(what):
    """One compilation with the first numbers, one for numbers that change, none after that."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    problem = make_problem(5, 57).leaves()
    s, a, head, t, w, teacher = problem.args()

    def step(number, setting):
        if what == "divergence":
            rows = [(number, t, teacher), (0.5, w, teacher)]
            options = {"divergence": "jsd", "temperature": number, "clip": number, "beta": number / 20}
            return fused_linear_divergence(s, head, rows, backend="torch", **options).loss * 1
        if what == "number":
            setting = VGSObjective(gamma=number, eta=number, temperature=number, lam=number)
        out = fused_linear_vgs_loss(s, a, head, t, w, teacher, objective=setting, vds_threshold=number, backend="torch")
        return out.loss * 1

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(12):
        args = (0.3 + i, VGSObjective(gamma=0.3 + i, eta=1.1 + i, temperature=0.7 + i, lam=0.01 * (i + 1)))
        results = []
        for function in (compiled, step):
            loss = function(*args)
            results.append([loss, *torch.autograd.grad(loss, (s, head))])
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_where_the_host_waits_no_graph_is_captured():
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in operators.synchronising_loss.tags
    assert unsafe not in operators.loss.tags


@pytest.mark.parametrize("reduction", [None, "sum", "none"])
@pytest.mark.parametrize("kind", ["vgs", "divergence", "logits"])
def test_a_teacher_from_inference_mode(kind, reduction):
    """The same loss and gradients as with ordinary tensors, also where the backward projects again."""
    problem = make_problem(5, 57)
    with torch.inference_mode():
        inferred = replace(problem, **{n: 1 * getattr(problem, n) for n in ("teacher_hidden", "teacher_text_hidden")})

    def run(s, a, head, t, w, teacher, **options):
        if kind == "vgs":
            out = fused_linear_vgs_loss(s, a, head, t, w, teacher, objective=SETTING, **options)
        elif kind == "divergence":
            out = fused_linear_divergence(s, head, [(1.0, t, teacher), (0.5, w, teacher)], **options)
        else:
            with torch.inference_mode(t.is_inference()):
                target = t @ teacher.T
            out = divergence_loss(s @ head.T, [(1.0, target)], divergence="jsd", **options)
        return replace(out, loss=(torch.linspace(-1, 2, 5, device=DEVICE) * out.loss).sum())

    names = [name for name in TRAINABLE if kind == "vgs" or "text" not in name]
    results = []
    for x in (inferred, problem):
        leaves = x.leaves([])
        student = {n: getattr(leaves, n).requires_grad_() for n in names if getattr(leaves, n) is not None}
        kept = replace(leaves, teacher_hidden=x.teacher_hidden, teacher_text_hidden=x.teacher_text_hidden)
        loss = run(*kept.args(), reduction=reduction).loss
        results.append([loss, *torch.autograd.grad(loss, list(student.values()))])
    assert inferred.teacher_hidden.is_inference()
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(x.any() for x in results[0])


def test_another_default_device():
    """Tensors say where a loss is computed, whatever torch makes new ones on."""
    logits = [torch.randn(3, 57) for _ in range(4)]
    expected = vgs_loss(*logits).loss
    torch.set_default_device("meta")
    try:
        found = vgs_loss(*logits).loss
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


FIRST_CALL = """
import sys, torch
from vgs_kernels import TargetRow, fused_linear_divergence
states = torch.randn(3, 4, requires_grad=True)
before = "torch._dynamo" in sys.modules
target = TargetRow(1.0, torch.randn(3, 5), torch.randn(7, 5))
fused_linear_divergence(states, torch.randn(7, 4), [target]).loss.backward()
assert states.grad.abs().sum() > 0
print(before, "torch._dynamo" in sys.modules)
"""


def test_a_first_call_does_not_load_dynamo():
    """A second of imports, which no caller needs that compiles nothing."""
    found = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
