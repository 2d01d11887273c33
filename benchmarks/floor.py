"""The floor: a job's bare matrix products, back to back, on the same inputs and from preallocated memory.

Logits are written in float32, as exactness demands (in the inputs' dtype on devices that cannot); gradients of logits
are read in the dtype in which a 16-bit product takes them; two views are stacked into one product. Nothing else
happens: no softmax, no reduction. Where logits are given there is no product: their floor is two additions that read
the four blocks once and write the two gradients once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgs_kernels.gemm import has_mixed_gemm

from .jobs import Job, Phase
from .problem import DenseProblem, Problem, Shape

#: Tokens of a product by device: enough to fill it, few enough that float32 logits of stacked views fit.
_BLOCK_TOKENS = {"cpu": 512, "cuda": 4096}


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a @ b, accumulated and stored in the dtype of ``out``."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)


class LinearFloor:
    """Callable on the leaves of a :class:`Problem`; all memory is allocated beforehand, outside the timing."""

    def __init__(self, problem: Problem, job: Job) -> None:
        self.shape = Shape(*problem.student_weight.shape, problem.teacher_weight.shape[1])
        self.phases = job.phases(self.shape)
        dtype, device = problem.student.dtype, problem.student.device
        self.block = block = min(problem.tokens, _BLOCK_TOKENS[device.type])
        views = max(max(phase.student, phase.teacher) for phase in self.phases)
        wide = torch.float32 if has_mixed_gemm(device, dtype) else dtype
        self._logits = torch.empty(views * block, self.shape.vocab, dtype=wide, device=device)
        # Products of zeros run faster than products of data: logit gradients look like p * noise.
        p = torch.softmax((problem.student[:64] @ problem.student_weight.T).float(), -1)
        pattern = (p * torch.randn_like(p)).to(dtype)
        self._d_logits = pattern.repeat(-(-block // len(pattern)), 1)[:block]
        self._d_hidden = torch.empty(block, self.shape.student, dtype=dtype, device=device)
        self._d_weight = torch.empty(self.shape.vocab, self.shape.student, dtype=wide, device=device)

    def __call__(self, leaves: Problem) -> None:
        with torch.no_grad():
            first = True
            for phase in self.phases:
                first = self._run(phase, leaves, first)

    def _run(self, phase: Phase, leaves: Problem, first: bool) -> bool:
        """One phase; ``first`` is whether the head gradient is still to be begun."""
        n = phase.tokens(leaves.tokens)
        for start in range(0, n, self.block):
            rows = slice(start, min(start + self.block, n))
            for count, views, weight in (
                (phase.student, (leaves.student, leaves.student_text), leaves.student_weight),
                (phase.teacher, (leaves.teacher, leaves.teacher_text), leaves.teacher_weight),
            ):
                if count:
                    hidden = torch.cat([view[rows] for view in views[:count]])
                    _multiply(hidden, weight.T, self._logits[: len(hidden)])
            d_logits = self._d_logits[: rows.stop - start]
            if phase.d_hidden:
                _multiply(d_logits, leaves.student_weight, self._d_hidden[: len(d_logits)])
            if phase.d_weight:
                _multiply(d_logits.T, leaves.student[rows], self._d_weight, add=not first)
                first = False
        return first


class DenseFloor:
    """The traffic of a loss on given logits: four blocks read, two written."""

    def __init__(self, problem: DenseProblem, job: Job) -> None:
        self._gradients = torch.empty_like(problem.student), torch.empty_like(problem.student_text)

    def __call__(self, leaves: DenseProblem) -> None:
        with torch.no_grad():
            torch.add(leaves.student, leaves.teacher, out=self._gradients[0])
            torch.add(leaves.student_text, leaves.teacher_text, out=self._gradients[1])


def make_floor(problem: DenseProblem, job: Job) -> Callable[[DenseProblem], None]:
    return DenseFloor(problem, job) if job.dense else LinearFloor(problem, job)
