"""What every loss benchmark runs on: named head shapes, and inputs that look like a trained pair of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Vocabulary and hidden sizes of a student-teacher pair's heads."""

    vocab: int
    student: int
    teacher: int


#: The teachers and students that people pair, and small ones for a CPU.
SHAPES = {
    "8b-2b": Shape(151_936, 2048, 4096),  # Qwen3-VL, the paper's first pair
    "8b-4b": Shape(151_936, 2560, 4096),  # Qwen3-VL, the paper's second
    "32b-8b": Shape(151_936, 4096, 5120),  # Qwen3-VL
    "8b-0.6b": Shape(151_936, 1024, 4096),  # Qwen3
    "gemma-12b-4b": Shape(262_144, 2560, 3840),
    "llava-13b-7b": Shape(32_000, 4096, 5120),
    "cpu": Shape(151_936, 1024, 2048),
    "gate": Shape(32_000, 512, 1024),
}

#: Standard deviation of the logits that do not matter; the sampled token's logit stands out by what its odds demand.
_SPREAD = 3.0
#: Rows of a given entropy: the share of their variance that all have in common, as the frequency of words is; how much
#: their lengths differ; the distances of the teacher and, as a power of ten, of the text-only view at most.
_COMMON, _LENGTHS, _TEACHER, _BLIND = 0.72, 0.15, 0.08, -0.5
_TRIED = 64  # tokens whose entropy is looked at
VIEWS = ("student", "student_text", "teacher", "teacher_text")


class Form(NamedTuple):
    """What a head does beside its product: logits = softcap * tanh(scale * (product + bias) / softcap)."""

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        return self.bias is None and self.scale == 1 and self.softcap is None

    def __call__(self, product: Tensor) -> Tensor:
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        if self.scale != 1:
            product = self.scale * product
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)


PLAIN = Form()


@dataclass(frozen=True)
class DenseProblem:
    """Four rows of logits that the caller holds, [N, V] each."""

    student: Tensor
    student_text: Tensor
    teacher: Tensor
    teacher_text: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for field in fields(self) if isinstance(x := getattr(self, field.name), Tensor))

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of the heads; the fields behind the tensors."""
        return ()

    def form(self, view: str) -> Form:
        """That of the head that a view goes through here."""
        return PLAIN

    @property
    def tokens(self) -> int:
        return len(self.student)

    def leaves(self, trainable: Sequence[str]) -> DenseProblem:
        """The same storage as fresh leaves, of which the named ones require grad."""
        names = [field.name for field in fields(self)][: len(self.tensors)]
        tensors = (getattr(self, name).detach().requires_grad_(name in trainable) for name in names)
        return type(self)(*tensors, *self.forms)

    def rotated(self, shift: int) -> DenseProblem:
        """The same tokens in another order, elsewhere in memory."""
        return type(self)(*(tensor.roll(shift, 0) for tensor in self.tensors))

    def first(self, tokens: int) -> DenseProblem:
        """The first tokens alone."""
        return type(self)(*(tensor[:tokens] for tensor in self.tensors))

    def wide(self) -> DenseProblem:
        """The same with heads in float64, if any, for repeated calls of ``logits``."""
        return self

    def logits(self, rows: slice | Tensor, views: Sequence[str] = VIEWS) -> list[Tensor]:
        """float64 logits [R, V] of some tokens in the named views."""
        return [self.form(view)(x) for view, x in zip(views, self.products(rows, views), strict=True)]

    def products(self, rows: slice | Tensor, views: Sequence[str]) -> list[Tensor]:
        """The same before their heads' forms."""
        return [getattr(self, view).detach()[rows].double() for view in views]


@dataclass(frozen=True)
class Problem(DenseProblem):
    """Hidden states [N, Ds] and [N, Dt] of both views, and both heads [V, Ds] and [V, Dt]."""

    student_weight: Tensor
    teacher_weight: Tensor
    student_form: Form = PLAIN
    teacher_form: Form = PLAIN

    @property
    def forms(self) -> tuple[Form, ...]:
        return self.student_form, self.teacher_form

    def form(self, view: str) -> Form:
        return self.student_form if view.startswith("student") else self.teacher_form

    def _views(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, **{view: change(getattr(self, view)) for view in VIEWS})

    def rotated(self, shift: int) -> Problem:
        return self._views(lambda view: view.roll(shift, 0))

    def first(self, tokens: int) -> Problem:
        return self._views(lambda view: view[:tokens])

    def wide(self) -> Problem:
        weights = {name: getattr(self, name).double() for name in ("student_weight", "teacher_weight")}
        return replace(self, **weights)

    def products(self, rows: slice | Tensor, views: Sequence[str]) -> list[Tensor]:
        weights = {view: self.student_weight if view.startswith("student") else self.teacher_weight for view in views}
        return [getattr(self, view).detach()[rows].double() @ weights[view].double().T for view in views]

    def dense(self) -> DenseProblem:
        """The same problem with its logits formed, in the dtype of the inputs."""
        weights = (self.student_weight, self.student_weight, self.teacher_weight, self.teacher_weight)
        pairs = zip(VIEWS, weights, strict=True)
        return DenseProblem(*(self.form(view)(getattr(self, view) @ weight.T) for view, weight in pairs))


def entropy(logits: Tensor) -> float:
    """The mean over rows, in nats."""
    log_p = torch.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


def _of_entropy(student: Tensor, weight: Tensor, nats: float, generator: torch.Generator) -> Tensor:
    """Hidden states whose rows have the tails of a language model's, in these directions.

    Of Gemma 3 270M (V 262,144), 256 tokens together need 34 % of the columns for all but 1 % of each one's gradient at
    3.2 nats, and 4 % for all but 0.1 % at 1.15 nats; of these rows (V 151,936) 20 to 36 % and 4 to 7 %. Other
    entropies are the same rows at another temperature.
    """
    common = torch.randn(student.shape[1], generator=generator, device=student.device)
    lengths = torch.randn(len(student), 1, generator=generator, device=student.device).mul(_LENGTHS).exp()
    student = lengths * (_COMMON**0.5 * common + (1 - _COMMON) ** 0.5 * student)
    logits, low, high = student[:_TRIED] @ weight.T, 0.0, 10.0
    for _ in range(12):
        factor = (low + high) / 2
        low, high = (factor, high) if entropy(factor * logits) > nats else (low, factor)
    return factor * student


def make_problem(
    shape: Shape, tokens: int, dtype: torch.dtype, device: str, seed: int = 0, nats: float | None = None
) -> Problem:
    """Peaked rows (sampled token's probability 0.3 to 0.999, the rest spread by 3), a teacher close to the student,
    text-only rows that differ from the multimodal ones slightly for most tokens and strongly for some.

    With ``nats``, rows of this mean entropy that have the tails of a language model's.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(tokens, 1, device=device).uniform_(low, high, generator=generator)

    def near(hidden: Tensor, distance: Tensor | float) -> Tensor:
        noise = normal(*hidden.shape)
        return hidden + distance * noise * (hidden.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))

    vocab, student_size, teacher_size = shape
    student_weight = normal(vocab, student_size).mul_(_SPREAD / student_size**0.5)
    sampled = torch.randint(vocab, (tokens,), generator=generator, device=device)
    direction = student_weight[sampled]
    direction = direction / direction.norm(dim=1, keepdim=True)
    student = normal(tokens, student_size)
    # exp of V normal logits sums to about V * exp(spread^2 / 2): what the sampled token is to be measured against.
    wanted = uniform(-0.8, 6.5) + torch.tensor(float(vocab)).log().item() + _SPREAD**2 / 2
    present = (student * direction).sum(1, keepdim=True)
    length = student_weight[sampled].norm(dim=1, keepdim=True)
    if nats is None:
        student += (wanted / length - present) * direction
    else:
        student = _of_entropy(student, student_weight, nats, generator)
    blind = 10 ** uniform(-1.7, 0 if nats is None else _BLIND)
    student_text = near(student, blind)

    # The teacher's head spans the same tokens in its first coordinates, or in as many as it has.
    shared = min(student_size, teacher_size)
    teacher_weight = normal(vocab, teacher_size).mul_(0.2 * _SPREAD / teacher_size**0.5)
    teacher_weight[:, :shared] += student_weight[:, :shared]

    def lift(hidden: Tensor) -> Tensor:
        return torch.nn.functional.pad(hidden[:, :shared], (0, teacher_size - shared))

    teacher = near(lift(student), 0.2 if nats is None else _TEACHER)
    teacher_text = near(teacher + 0.7 * lift(student_text - student), 0.7 * blind)
    tensors = (student, student_text, teacher, teacher_text, student_weight, teacher_weight)
    return Problem(*(tensor.to(dtype) for tensor in tensors))
