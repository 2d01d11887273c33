"""Time of forward + backward: the fused loss, eager PyTorch and the GEMM floor, in one process. And a meter of
allocations, for tests that count memory instead of timing."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from vgs_kernels import VGSObjective, fused_linear_vgs_loss
from vgs_kernels.reference import vgs_reference


@dataclass
class Problem:
    """Inputs of one call; text-only rows are a perturbation of the multimodal ones, teacher and student are close."""

    student: Tensor
    student_text: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_text: Tensor
    teacher_weight: Tensor

    @classmethod
    def make(cls, n: int, vocab: int, student_size: int, teacher_size: int, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * std

        shared = min(student_size, teacher_size)
        student_weight = normal(vocab, student_size, std=4 / student_size**0.5)
        teacher_weight = normal(vocab, teacher_size, std=0.5 / teacher_size**0.5)
        teacher_weight[:, :shared] += student_weight[:, :shared]
        student = normal(n, student_size)
        teacher = normal(n, teacher_size, std=0.5)
        teacher[:, :shared] += student[:, :shared]
        tensors = (
            student,
            student + normal(n, student_size, std=0.3),
            student_weight,
            teacher,
            teacher + normal(n, teacher_size, std=0.3),
            teacher_weight,
        )
        return cls(*(tensor.to(dtype) for tensor in tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def leaves(self) -> list[Tensor]:
        """Copies of the inputs, those of the student requiring grad."""
        tensors = [tensor.detach() for tensor in self.tensors]
        return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(tensors)]


class AllocationMeter(TorchDispatchMode):
    """Bytes held by tensors that operators create, now and at the peak; the largest single one.

    Blind to what happens inside a registered operator: call the operator's body instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = self.largest = 0
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor, known)
        return result

    def _track(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            if key in known:
                return  # a view of, or a write to, an input
            self.current += size
            self.peak = max(self.peak, self.current)
            self.largest = max(self.largest, size)
            self._tensors[key] = 0
        self._tensors[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.current -= size


def fused(leaves: list[Tensor], objective: VGSObjective) -> None:
    fused_linear_vgs_loss(*leaves, objective=objective).loss.backward()


def eager(leaves: list[Tensor], objective: VGSObjective) -> None:
    s, a, ws, t, w, wt = leaves
    with torch.no_grad():
        teacher = t @ wt.T, w @ wt.T
    vgs_reference(s @ ws.T, a @ ws.T, *teacher, objective)["loss"].backward()


def floor(leaves: list[Tensor], objective: VGSObjective) -> None:
    """The matrix products that the objective cannot do without (with the language term on 30 % of the tokens)."""
    s, a, ws, t, w, wt = (leaf.detach() for leaf in leaves)
    student = torch.cat([s, a]) @ ws.T
    torch.cat([t, w]) @ wt.T
    d_logits = student[: len(s)]
    d_logits @ ws
    d_weight = d_logits.T @ s
    gated = a[: int(0.3 * len(a))] if objective.lam > 0 else a[:0]
    d_logits = gated @ ws.T
    w[: len(gated)] @ wt.T
    d_logits @ ws
    d_weight.addmm_(d_logits.T, gated)


METHODS: dict[str, Callable[[list[Tensor], VGSObjective], None]] = {"floor": floor, "fused": fused, "eager": eager}


def measure(problem: Problem, objective: VGSObjective, repeats: int) -> dict[str, float]:
    """Median seconds of every method, taken in turns so that drift of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    cuda = problem.student.is_cuda
    for _ in tqdm(range(repeats + 1), desc="loss", unit="round"):
        for name, method in METHODS.items():
            leaves = problem.leaves()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            method(leaves, objective)
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples[1:]) for name, samples in times.items()}
