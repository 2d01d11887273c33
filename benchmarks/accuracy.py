"""The gradient in float64, on a sample: what stands beside every time.

The definition (:mod:`vgs_kernels.reference`) runs in float64, a few tokens at a time; gradients are kept for a sample
of tokens and, of the head, for a sample of vocabulary rows. The head's takes all tokens: on a CPU it is left out where
they are many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vgs_kernels.gating import grouped_quantile
from vgs_kernels.reference import divergence_reference, kl_divergence, vgs_reference

from .jobs import Job
from .problem import VIEWS, DenseProblem

_SAMPLED_TOKENS, _SAMPLED_COLUMNS = 64, 256
#: With more tokens than these, the head is left out.
_HEAD_TOKENS = {"cpu": 512, "cuda": float("inf")}
#: float64 numbers of one [R, V] block: about thirty such blocks are alive at a time.
_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


def _blocks(problem: DenseProblem, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
    """Indices of some tokens (default: all), few enough at a time."""
    device = problem.student.device
    vocab = problem.logits(slice(0, 1), VIEWS[:1])[0].shape[1]
    tokens = torch.arange(problem.tokens, device=device) if tokens is None else tokens
    return tokens.split(max(1, _BLOCK_ELEMENTS[device.type] // vocab))


def vds_threshold(problem: DenseProblem, quantile: float) -> float:
    """The quantile of KL(q_I || q_x) over all tokens."""
    scores, problem = [], problem.wide()
    for rows in _blocks(problem):
        teacher, teacher_text = problem.logits(rows, ("teacher", "teacher_text"))
        scores.append(kl_divergence(torch.log_softmax(teacher, -1), torch.log_softmax(teacher_text, -1)))
    return grouped_quantile(torch.cat(scores), quantile)[0].item()


def _loss(logits: list[Tensor], job: Job, threshold: float | None, n: int) -> Tensor:
    """Sum of the tokens' losses over ``n``."""
    if job.plain:
        student, teacher = logits
        return divergence_reference(student, [(1.0, teacher)], job.divergence).sum() / n
    weights = torch.full_like(logits[0][:, 0], 1 / n)
    limits = (float("inf") if threshold is None else threshold,)
    return vgs_reference(*logits, job.objective, weights, vds_threshold=limits)["loss"]


@dataclass
class Exact:
    """Gradients of the student's inputs at the sampled tokens and vocabulary rows, in float64."""

    tokens: Tensor
    columns: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, problem: DenseProblem, job: Job, threshold: float | None) -> Exact:
        problem, n = problem.wide(), problem.tokens
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randperm(n, generator=generator)[:_SAMPLED_TOKENS].sort().values.to(problem.student.device)
        student = problem.logits(slice(0, _SAMPLED_COLUMNS // 2), VIEWS[:1])[0]
        # Half of the vocabulary rows are ones that matter, half are any: most of a head receives next to nothing.
        some = torch.randperm(student.shape[1], generator=generator)[: _SAMPLED_COLUMNS // 2]
        columns = torch.cat([student.argmax(-1), some.to(student.device)]).unique()

        with_head = "student_weight" in job.trainable and n <= _HEAD_TOKENS[problem.student.device.type]
        views = {"student": [], "student_text": []}
        d_weight = 0.0
        for rows in _blocks(problem, None if with_head else tokens):
            with torch.enable_grad():
                names = VIEWS[::2] if job.plain else VIEWS
                products = problem.products(rows, names)
                leaves = [x.requires_grad_() for x in products[: len(products) // 2]]
                logits = [problem.form(view)(x) for view, x in zip(names, products, strict=True)]
                loss = _loss(logits, job, threshold, n)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            sampled = torch.isin(rows, tokens)
            for view, gradient in zip(views, gradients, strict=False):
                if gradient is None:
                    continue
                wanted = gradient[sampled]
                views[view].append(wanted if job.dense else wanted @ problem.student_weight)
                if with_head:
                    d_weight = d_weight + gradient[:, columns].T @ getattr(problem, view)[rows].double()
        result = {view: torch.cat(parts) for view, parts in views.items() if parts and view in job.trainable}
        if with_head:
            result["student_weight"] = d_weight
        return cls(tokens, columns, result)

    def errors(self, leaves: DenseProblem) -> dict[str, float]:
        """||gradient - exact|| / ||exact|| of every input that requires grad, on the sample."""
        errors = {}
        for name, exact in self.gradients.items():
            gradient = getattr(leaves, name).grad
            if gradient is None:
                raise RuntimeError(f"{name} requires grad and received none.")
            sample = gradient[self.columns if name == "student_weight" else self.tokens].double()
            errors[name] = ((sample - exact).norm() / exact.norm()).item()
        return errors
