"""Realistic inputs for the loss, and the comparison of one implementation with another.

Near-uniform noise hides most mistakes, so the inputs look like a trained pair of models: head rows come in correlated
clusters, every row of logits is peaked (largest probability 0.3 to 0.999, logit spread 3 to 8), the teacher's head
spans the same tokens in another hidden size, and the text-only rows are perturbed multimodal rows, most of them only
slightly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

INPUTS = (
    "student_hidden",
    "student_text_hidden",
    "student_weight",
    "teacher_hidden",
    "teacher_text_hidden",
    "teacher_weight",
)
TRAINABLE = ("student_hidden", "student_text_hidden", "student_weight", "student_bias")
TERMS = ("standard", "visual", "language", "vds", "entropy", "student_vds", "target_logps")
FAR, NEAR = 0.5, 1e-2  # distance of the teacher from the student, as a fraction of the logits' spread
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Problem:
    """The tensors of one call; shapes as in ``fused_linear_vgs_loss``."""

    student_hidden: Tensor
    student_text_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_text_hidden: Tensor
    teacher_weight: Tensor
    target_ids: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.student_hidden.shape[0]

    def to(self, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Problem:
        def move(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def rows(self, index: Tensor | slice) -> Problem:
        """The same heads, a selection of tokens."""
        names = [name for name in INPUTS if "hidden" in name] + ["target_ids"]
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def leaves(self, requires_grad: Sequence[str] = TRAINABLE) -> Problem:
        """Fresh leaf copies (strides kept), of which the named ones require grad."""

        def leaf(name: str, value: Tensor | None) -> Tensor | None:
            if value is None or not value.is_floating_point():
                return value
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            return copy.copy_(value.detach()).requires_grad_(name in requires_grad)

        return replace(self, **{f.name: leaf(f.name, getattr(self, f.name)) for f in fields(self)})

    def args(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in INPUTS)

    def biases(self) -> dict[str, Tensor]:
        names = ("student_bias", "teacher_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _peaked(hidden: Tensor, weight: Tensor, top: Tensor) -> Tensor:
    """Rescale each hidden row until its largest probability is ``top`` (bisection), keeping the spread in [3, 8]."""
    low, high = torch.zeros_like(top), torch.full_like(top, 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        probability = torch.softmax(middle[:, None] * (hidden @ weight.T), -1).amax(-1)
        low, high = torch.where(probability < top, middle, low), torch.where(probability < top, high, middle)
    spread = (hidden @ weight.T).std(-1)
    return hidden * low.clamp(3 / spread, 8 / spread)[:, None]


def make_problem(
    tokens: int = 65,
    vocab: int = 257,
    student_dim: int = 24,
    teacher_dim: int = 32,
    *,
    gap: float = FAR,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = DEVICE,
) -> Problem:
    """A student, a teacher at distance ``gap`` and both views of ``tokens`` response positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def near(hidden: Tensor, noise: Tensor, distance: Tensor | float) -> Tensor:
        size = hidden.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return hidden + distance * size * noise

    cluster = torch.randint(max(vocab // 8, 1), (vocab,), generator=generator)
    weight = (normal(vocab, student_dim)[cluster] + 0.7 * normal(vocab, student_dim) + 0.3 * normal(1, student_dim)) / (
        student_dim**0.5
    )
    target_ids = torch.randint(vocab, (tokens,), generator=generator)
    odds = torch.empty(tokens, dtype=torch.float64).uniform_(-0.8, 6.5, generator=generator)
    hidden = _peaked(near(weight[target_ids], normal(tokens, student_dim), 0.5), weight, torch.sigmoid(odds))

    # Most tokens hardly depend on the image, some strongly: log-uniform distance of the text-only rows.
    blind = 10 ** torch.empty(tokens, 1, dtype=torch.float64).uniform_(-2, -0.1, generator=generator)
    direction = normal(tokens, student_dim)
    lift = torch.linalg.qr(normal(teacher_dim, student_dim))[0]  # isometry: the same logits in the teacher's space
    teacher = near(hidden @ lift.T, normal(tokens, teacher_dim), gap)
    shift = 0.7 * (direction + normal(tokens, student_dim)) @ lift.T  # partly the student's own text-only shift
    values = {
        "student_hidden": hidden,
        "student_text_hidden": near(hidden, direction, blind),
        "student_weight": weight,
        "teacher_hidden": teacher,
        "teacher_text_hidden": near(teacher, shift, blind),
        "teacher_weight": near(weight @ lift.T, normal(vocab, teacher_dim), 0.3 * gap),
    }
    if bias:
        values["student_bias"] = 0.5 * normal(vocab)
        values["teacher_bias"] = values["student_bias"] + gap * 0.5 * normal(vocab)
    return Problem(target_ids=target_ids, **values).to(dtype=dtype, device=device)


@dataclass
class Evaluation:
    """What one call returned: the output object, and the gradients by name."""

    output: Any
    gradients: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return self.output.loss.detach()


def _upcast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def evaluate(
    function: Callable[..., Any],
    problem: Problem,
    *,
    requires_grad: Sequence[str] = TRAINABLE,
    dtype: torch.dtype | None = None,
    grad_output: float = 1.0,
    **options: Any,
) -> Evaluation:
    """Call ``function`` on leaf copies of ``problem`` (in ``dtype``) and run its backward."""
    leaves = problem.to(dtype=dtype).leaves(requires_grad)
    if dtype is not None:
        options = {name: _upcast(value, dtype) for name, value in options.items()}
    output = function(*leaves.args(), **leaves.biases(), **options)
    required = {n: getattr(leaves, n) for n in TRAINABLE if n in requires_grad and getattr(leaves, n) is not None}
    if required:
        (grad_output * output.loss).backward()
    for name in TRAINABLE + INPUTS[3:]:
        leaf = getattr(leaves, name)
        if leaf is not None and name not in required:
            assert leaf.grad is None, f"{name} does not require grad but received one"
    return Evaluation(output, {name: leaf.grad for name, leaf in required.items()})


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; 0 expected means exactly 0 wanted."""
    error = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def largest_logit(problem: Problem) -> float:
    """Largest |logit| that any of the four rows multiplies out to (finite entries)."""
    exact = problem.to(dtype=torch.float64)
    pairs = (
        (exact.student_hidden, exact.student_weight),
        (exact.student_text_hidden, exact.student_weight),
        (exact.teacher_hidden, exact.teacher_weight),
        (exact.teacher_text_hidden, exact.teacher_weight),
    )
    return max(((h @ w.T).abs().max().item() for h, w in pairs if h.numel()), default=0.0)


def value_floor(problem: Problem, temperature: float = 1.0) -> float:
    """Absolute error that float32 logits force upon a KL.

    A KL is a small difference of numbers as large as the logits L: an expected gap and two log-normalisers, each of
    which carries the rounding of its logits, half an ulp in storage and about as much from the dot product. Four such
    errors of eps/2 * L make 2 eps L, 1e-5 here: 1e-4 of a typical term of the far teacher. Of the nearly equal one it
    is as large as the standard term itself, which is why gradients and float64 are compared there as well.
    """
    return 2 * torch.finfo(torch.float32).eps * largest_logit(problem) / min(temperature, 1.0)


def float32_bars(problem: Problem, exact: Evaluation, function: Callable[..., Any], **options: Any) -> dict[str, float]:
    """Bounds on the relative error of each float32 gradient: 1e-5, or six times plain float32 PyTorch if that is more.

    Gradients are differences of nearly equal logits when student and teacher agree: rounding the logits to float32 then
    costs more than 1e-5 in any implementation. Six times, for of a few rows one rounding error decides, on both sides;
    over many problems the two are equal.
    With a live prior the text-only rows receive gamma * (q* - p_I): of two peaked and nearly equal distributions, what
    is left is the rounding of their normalisers, a few eps at the peak, which PyTorch on a CPU sums in float64.
    ``function`` is the plain implementation; the bars never exceed 1e-3.
    """
    plain = evaluate(function, problem, requires_grad=list(exact.gradients), **options)
    objective = options.get("objective")
    bars = {}
    for name, gradient in plain.gradients.items():
        reference = exact.gradients[name]
        error = 0.0 if reference is None else relative_error(gradient, reference)
        bars[name] = min(max(1e-5, 6 * error), 1e-3)
        if name != "student_hidden" and objective is not None and not objective.detach_prior:
            rows = {"student_text_hidden": problem.student_weight, "student_weight": problem.student_text_hidden}
            peak = rows[name].double().norm(dim=1).max() if name in rows else 1.0
            rounding = 4 * torch.finfo(torch.float32).eps * objective.eta * objective.gamma * peak
            rounding = torch.as_tensor(rounding / len(problem.student_hidden) ** 0.5)
            bars[name] = min(max(bars[name], (rounding / reference.norm()).item()), 1e-3)
    return bars


def assert_terms_close(actual: Any, expected: Any, *, rtol: float, floor: float, names: Sequence[str] = TERMS) -> None:
    """Per-token terms within ``rtol`` of each value plus ``floor``; the gate exactly."""
    for name in names:
        ours, exact = getattr(actual, name), getattr(expected, name)
        if exact is None:
            assert ours is None, name
            continue
        assert ours.shape == exact.shape, (name, ours.shape)
        assert not ours.requires_grad, name
        torch.testing.assert_close(
            ours.double(), exact.double(), rtol=rtol, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert actual.gate.dtype == torch.bool
    assert torch.equal(actual.gate, expected.gate)


def assert_gradients_close(actual: Evaluation, expected: Evaluation, *, rtol: float | dict[str, float]) -> None:
    """Relative error of each gradient; a gradient the oracle does not define must be zeros, never absent."""
    for name, ours in actual.gradients.items():
        assert ours is not None, f"{name} requires grad and received none"
        exact = expected.gradients[name]
        exact = torch.zeros_like(ours) if exact is None else exact
        error = relative_error(ours, exact)
        bound = rtol[name] if isinstance(rtol, dict) else rtol
        assert error <= bound, f"gradient of {name}: relative error {error:.2e}, allowed {bound:.2e}"
