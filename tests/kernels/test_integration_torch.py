"""The loss inside PyTorch's own machinery: autocast, checkpointing, torch.compile, operator checks."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import DEVICE, TRAINABLE, assert_gradients_close, evaluate, make_problem, relative_error
from torch.utils.checkpoint import checkpoint

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

SETTING = VGSObjective(lam=0.1)


def test_autocast_equals_an_explicit_cast(backend):
    """Under autocast the projections read 16-bit inputs; gradients come back in the dtype of the parameters."""
    problem = make_problem(7, 57, bias=True)

    def explicit(*args, student_bias, teacher_bias, **options):
        cast = [tensor.to(torch.bfloat16) for tensor in (*args, student_bias, teacher_bias)]
        return fused_linear_vgs_loss(*cast[:6], student_bias=cast[6], teacher_bias=cast[7], **options)

    def automatic(*args, **options):
        with torch.autocast(DEVICE, torch.bfloat16):
            return fused_linear_vgs_loss(*args, **options)

    options = {"objective": SETTING, "backend": backend}
    expected, ours = evaluate(explicit, problem, **options), evaluate(automatic, problem, **options)
    plain = evaluate(fused_linear_vgs_loss, problem, **options)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
    assert (
        abs(plain.loss - expected.loss) > 1e-4 * plain.loss.abs()
    )  # the cast is visible, so the equality says something
    assert ours.output.loss.dtype == torch.float32
    for name, gradient in expected.gradients.items():
        assert ours.gradients[name].dtype == torch.float32
        assert relative_error(ours.gradients[name], gradient) < 2 * torch.finfo(torch.bfloat16).eps, name


def test_autocast_leaves_the_divergence_and_dense_logits_usable():
    problem = make_problem(5, 57)
    logits = problem.student_hidden @ problem.student_weight.T
    with torch.autocast(DEVICE, torch.bfloat16):
        dense = vgs_loss(logits, logits, logits, logits)
        out = fused_linear_divergence(
            problem.student_hidden, problem.student_weight, [(1.0, problem.teacher_hidden, problem.teacher_weight)]
        )
    assert dense.loss.abs() < 1e-5
    assert out.loss.dtype == torch.float32


def test_mixed_parameters_under_autocast():
    """float32 master head, 16-bit hidden states: what FSDP mixed precision or LoRA hands over."""
    problem = make_problem(5, 57)
    leaves = problem.leaves()
    hidden = [tensor.to(torch.bfloat16) for tensor in (leaves.student_hidden, leaves.student_text_hidden)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = fused_linear_vgs_loss(*hidden, leaves.student_weight, *(t.bfloat16() for t in leaves.args()[3:]))
    out.loss.backward()
    assert leaves.student_weight.grad.dtype == torch.float32
    expected = evaluate(fused_linear_vgs_loss, problem.to(dtype=torch.bfloat16))
    torch.testing.assert_close(out.loss.detach(), expected.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    problem = make_problem(7, 57, bias=True)

    def checkpointed(*args, **options):
        class Output:
            loss = checkpoint(
                lambda *inputs: fused_linear_vgs_loss(*inputs, **options).loss, *args, use_reentrant=reentrant
            )

        return Output

    names = TRAINABLE[:3]  # reentrant checkpointing sees only what is passed as an argument
    expected = evaluate(fused_linear_vgs_loss, problem, requires_grad=names, objective=SETTING)
    ours = evaluate(checkpointed, problem, requires_grad=names, objective=SETTING)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=0)
    assert_gradients_close(ours, expected, rtol=0)


def test_inside_a_model_with_checkpointed_backbone():
    """Gradients flow on through the hidden states into whatever produced them."""
    problem = make_problem(7, 57)
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh()).to(DEVICE)
    twin = copy.deepcopy(backbone)
    for model, run in ((backbone, lambda m, x: checkpoint(m, x, use_reentrant=False)), (twin, lambda m, x: m(x))):
        hidden, text = run(model, problem.student_hidden), run(model, problem.student_text_hidden)
        (fused_linear_vgs_loss(hidden, text, *problem.args()[2:], objective=SETTING).loss / 2).backward()
    for parameter, other in zip(backbone.parameters(), twin.parameters(), strict=True):
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, other.grad)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def step(hidden, text, weight, t, w, teacher, bias, teacher_bias, ids):
        """A caller with work of its own on both sides, using the loss and some of the terms."""
        out = fused_linear_vgs_loss(
            hidden * 1.0, text, weight, t, w, teacher,
            student_bias=bias, teacher_bias=teacher_bias, target_ids=ids, objective=SETTING, backend="torch",
        )  # fmt: skip
        return out.loss * 2, out.visual + out.entropy, out.gate, out.target_logps, out.metrics()["vds"]

    @staticmethod
    def inputs(problem):
        return (*problem.args(), problem.student_bias, problem.teacher_bias, problem.target_ids)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_caller_gives_the_same(self, dtype):
        problem = make_problem(7, 57, bias=True, dtype=dtype)
        compiled = torch.compile(self.step, fullgraph=True, backend="aot_eager")
        eager_leaves, leaves = problem.leaves(), problem.leaves()
        expected, ours = self.step(*self.inputs(eager_leaves)), compiled(*self.inputs(leaves))
        for actual, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(actual, reference)
        expected[0].backward()
        ours[0].backward()
        for name in TRAINABLE:
            torch.testing.assert_close(getattr(leaves, name).grad, getattr(eager_leaves, name).grad)

    def test_batch_lengths_do_not_recompile(self):
        """One compilation for the first length, one for the dynamic shape, none after that."""
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(self.step, fullgraph=True, backend=counter)
        for tokens in (7, 9, 12, 31, 64):
            problem = make_problem(tokens, 57, bias=True)
            loss = compiled(*self.inputs(problem.leaves()))[0]
            torch.testing.assert_close(loss, self.step(*self.inputs(problem.leaves()))[0])
        assert counter.frame_count <= 2

    @pytest.mark.parametrize("frozen", [("student_weight", "student_bias"), ("student_hidden", "student_text_hidden")])
    def test_frozen_inputs(self, frozen):
        problem = make_problem(7, 57, bias=True)
        required = [name for name in TRAINABLE if name not in frozen]
        eager_leaves, leaves = problem.leaves(required), problem.leaves(required)
        self.step(*self.inputs(eager_leaves))[0].backward()
        torch.compile(self.step, fullgraph=True, backend="aot_eager")(*self.inputs(leaves))[0].backward()
        for name in TRAINABLE:
            torch.testing.assert_close(getattr(leaves, name).grad, getattr(eager_leaves, name).grad)

    def test_numbers_that_change(self):
        """The compiler makes the second value of a number symbolic."""
        problem = make_problem(7, 57)

        def step(hidden, weight, t, w, teacher, coefficient, temperature):
            rows = [(1.0, t, teacher), (coefficient, w, teacher)]
            options = {"divergence": "jsd", "temperature": temperature, "backend": "torch", "reduction": "none"}
            return fused_linear_divergence(hidden, weight, rows, **options).loss.sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        tensors = (problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_text_hidden)
        for numbers in ((0.1, 1.0), (0.2, 1.3), (0.3, 0.9)):
            args = (*tensors, problem.teacher_weight, *numbers)
            torch.testing.assert_close(compiled(*args), step(*args))

    def test_divergence_and_dense_logits(self):
        problem = make_problem(7, 57)

        def step(hidden, weight, t, teacher):
            out = fused_linear_divergence(hidden, weight, [(1.0, t, teacher)], backend="torch")
            logits = hidden @ weight.T
            return out.loss + vgs_loss(logits, logits.detach(), t @ teacher.T, t @ teacher.T, backend="torch").loss

        args = (problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_weight)
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))

    @pytest.mark.parametrize(
        "options",
        [
            {"divergence": "jsd", "support": "plausible", "plausibility": 0.01, "clip": 0.1},
            {"support": "student_top_k", "top_k": 9, "temperature_squared": True},
            {"divergence": "sampled_reverse_kl", "token_clip": 1.0, "reduction": "none"},
        ],
        ids=["plausible", "student top-k", "sampled"],
    )
    @pytest.mark.parametrize("hidden", [True, False], ids=["hidden states", "logits"])
    @pytest.mark.slow
    def test_options_of_a_divergence(self, options, hidden):
        """What the public function does with its arguments can be traced, in every version that is supported."""
        problem = make_problem(7, 57, bias=True)
        ids, options = problem.target_ids, {"backend": "torch", **options}

        def step(student, weight, t, w, teacher, advantages):
            given = {"target_ids": ids, **options}
            if "reduction" not in options:
                given["policy"] = PolicyTerm(advantages, advantages.abs())
            if hidden:
                rows = [(1.0, t, teacher), (0.5, student, weight), (advantages, w, teacher)]
                out = fused_linear_divergence(student, weight, rows, **given)
            else:
                out = divergence_loss(student @ weight.T, [(1.0, t @ teacher.T), (advantages, w @ teacher.T)], **given)
            return out.loss.sum() + out.entropy.sum()

        args = (problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_text_hidden)
        args = (*args, problem.teacher_weight, torch.linspace(-1, 1, 7, device=DEVICE))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), step(*args))

    def test_options_of_the_vgs_loss(self):
        problem = make_problem(7, 57)

        def step(*args):
            ids = torch.arange(7, device=DEVICE)
            adaptive = VGSObjective(lam=0.5, schedule="adaptive", vds_scope="trajectory")
            out = fused_linear_vgs_loss(*args, objective=adaptive, trajectory_ids=ids % 3, backend="torch")
            plain = VGSObjective(lam=0.0)
            policy = PolicyTerm(torch.ones(7, device=DEVICE), torch.ones(7, device=DEVICE))
            options = {"target_ids": ids, "policy": policy, "backend": "torch", "return_terms": False}
            folded = fused_linear_vgs_loss(*args, objective=plain, **options)
            return out.loss + folded.loss

        torch.testing.assert_close(
            torch.compile(step, fullgraph=True, backend="aot_eager")(*problem.args()), step(*problem.args())
        )
