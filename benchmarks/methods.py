"""Everything that is timed: ours, and each peer on the same job.

A method is made for one problem and one job and then called with fresh leaves; it leaves gradients in them. Peers are
called through their public interface, with the options that give them their best accuracy at full speed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vgs_kernels import Head, fused_linear_divergence, fused_linear_vgs_loss, vgs_loss

from .floor import make_floor
from .jobs import Job
from .problem import VIEWS, DenseProblem, Form, Problem

#: Tokens of a chunk of the checkpointed version: what Liger's chunked losses use.
CHUNK_TOKENS = 1024

Loss = Callable[[DenseProblem], Tensor]


@dataclass(frozen=True)
class Context:
    """What a method is made from."""

    problem: DenseProblem
    job: Job
    threshold: float | None

    @property
    def given_threshold(self) -> float | None:
        """The VDS threshold where the job knows it beforehand."""
        return self.threshold if self.job.threshold_given else None


# --- ours ---------------------------------------------------------------------------------------------------------


def _ours(context: Context, **options: float) -> Loss:
    job = context.job

    def loss(x: DenseProblem) -> Tensor:
        if job.dense:
            return vgs_loss(*x.tensors, objective=job.objective).loss
        if job.plain:
            target = [(1.0, x.teacher, Head(x.teacher_weight, *x.teacher_form))]
            divergence, head = asdict(job.divergence), Head(x.student_weight, *x.student_form)
            return fused_linear_divergence(x.student, head, target, **divergence, **options).loss
        output = fused_linear_vgs_loss(
            x.student,
            x.student_text,
            Head(x.student_weight, *x.student_form),
            x.teacher,
            x.teacher_text,
            Head(x.teacher_weight, *x.teacher_form),
            objective=job.objective,
            vds_threshold=context.given_threshold,
            return_terms=not job.folded,
            **options,
        )
        return output.loss

    return loss


# --- PyTorch as one writes it -------------------------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, -1, dtype=torch.float32)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (log_p - log_q)).sum(-1)


def _logits(x: DenseProblem, job: Job) -> list[Tensor | None]:
    """In the inputs' dtype, as a model's head gives them: student, text-only, teacher, text-only."""
    if not isinstance(x, Problem):
        return list(x.tensors)
    student = x.student_form(x.student @ x.student_weight.T)
    with torch.no_grad():
        teacher = x.teacher_form(x.teacher @ x.teacher_weight.T)
        if job.plain:
            return [student, None, teacher, None]
        teacher_text = x.teacher_form(x.teacher_text @ x.teacher_weight.T)
    with torch.set_grad_enabled(job.objective.lam > 0):
        return [student, x.student_form(x.student_text @ x.student_weight.T), teacher, teacher_text]


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised JSD with the mixture beta * q + (1 - beta) * p; 0 is KL(q || p), 1 is KL(p || q)."""
    if beta == 1:
        return _kl(log_p.exp(), log_p, log_q)
    q = log_q.exp()
    if beta == 0:
        return _kl(q, log_q, log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * _kl(q, log_q, log_m) + (1 - beta) * _kl(log_p.exp(), log_p, log_m)


def _vds(log_q: Tensor, log_qx: Tensor) -> Tensor:
    with torch.no_grad():
        return _kl(log_q.exp(), log_q, log_qx)


def _plain_loss(x: DenseProblem, job: Job, threshold: Tensor | float | None = None) -> Tensor:
    """Sum over the tokens: the formula of the paper on float32 log-probabilities, gradients by autograd."""
    student, text, teacher, teacher_text = _logits(x, job)
    log_p = _log_softmax(student)
    with torch.no_grad():
        log_q = _log_softmax(teacher)
    if job.plain:
        return _divergence(log_p, log_q, job.beta).sum()
    p, objective = log_p.exp(), job.objective
    with torch.set_grad_enabled(objective.lam > 0):
        log_px = _log_softmax(text)
    with torch.no_grad():
        log_qx = _log_softmax(teacher_text)
        steered = _log_softmax(log_px + log_q - log_qx)
    loss = _kl(p, log_p, log_q) + objective.gamma * _kl(p, log_p, steered)
    if objective.lam > 0:
        vds = _vds(log_q, log_qx)
        limit = torch.quantile(vds, objective.vds_quantile) if threshold is None else threshold
        loss = loss + objective.lam * (vds > limit) * _kl(log_px.exp(), log_px, log_qx)
    return objective.eta * loss.sum()


def _eager(context: Context) -> Loss:
    return lambda x: _plain_loss(x, context.job, context.given_threshold) / x.tokens


def _compiled(context: Context) -> Loss:
    torch._dynamo.reset()
    kind, forms = type(context.problem), context.problem.forms
    job, threshold = context.job, context.given_threshold

    def loss(*tensors: Tensor) -> Tensor:
        x = kind(*tensors, *forms)
        return _plain_loss(x, job, threshold) / x.tokens

    compiled = torch.compile(loss, fullgraph=True)
    return lambda x: compiled(*x.tensors)


def _checkpointed(context: Context) -> Loss:
    """Chunks of tokens whose logits are formed again in the backward; one more pass of the teacher for the quantile."""
    job = context.job

    def chunks(x: Problem) -> list[Problem]:
        views = [getattr(x, view).split(CHUNK_TOKENS) for view in VIEWS]
        return [Problem(*parts, x.student_weight, x.teacher_weight, *x.forms) for parts in zip(*views, strict=True)]

    def chunk_loss(*arguments: Tensor) -> Tensor:
        *tensors, limit = arguments
        return _plain_loss(Problem(*tensors, *context.problem.forms), job, limit)

    def chunk_vds(x: Problem) -> Tensor:
        views = (x.teacher, x.teacher_text)
        return _vds(*(_log_softmax(x.teacher_form(view @ x.teacher_weight.T)) for view in views))

    def loss(x: Problem) -> Tensor:
        limit = context.given_threshold
        if job.objective.lam > 0 and limit is None:
            with torch.no_grad():
                limit = torch.quantile(torch.cat([chunk_vds(c) for c in chunks(x)]), job.objective.vds_quantile)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        parts = [checkpoint(chunk_loss, *chunk.tensors, limit, **options) for chunk in chunks(x)]
        return torch.stack(parts).sum() / x.tokens

    return loss


# --- other packages: plain distillation ---------------------------------------------------------------------------
# Their beta is ours: the mixture is beta * teacher + (1 - beta) * student, 0 the forward and 1 the reverse KL.


def _trl(context: Context) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Problem) -> Tensor:
        (bias, *student), (teacher_bias, *teacher) = x.forms
        heads = x.student, x.student_weight, bias, x.teacher, x.teacher_weight, teacher_bias
        divergence, _ = ChunkedDivergenceFunction.apply(*heads, context.job.beta, 1.0, *student, *teacher)
        return divergence.mean()

    return loss


def _liger_jsd(context: Context) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=context.job.beta, accum_dtype=torch.float32)
    return lambda x: module(x.student, x.student_weight, x.teacher, x.teacher_weight, None)


def _liger_kl(context: Context) -> Loss:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss(reduction="batchmean", accum_dtype=torch.float32)

    def loss(x: Problem) -> Tensor:
        with torch.no_grad():  # it takes the teacher's probabilities
            target = torch.softmax(x.teacher @ x.teacher_weight.T, -1, dtype=torch.float32)
        return module(x.student, x.student_weight, target)

    return loss


def _liger_chunked(context: Context) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Without its weight no cross-entropy is computed, and the labels only say that no token is ignored.
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=context.job.beta)
    labels = torch.zeros(context.problem.tokens, dtype=torch.int64, device=context.problem.student.device)
    return lambda x: module(x.student, x.student_weight, x.teacher, x.teacher_weight, labels)


@cache
def _unsloth_file() -> ModuleType:
    """Unsloth's file of fused losses without its package, which patches torch and transformers when it is imported."""
    (folder,) = importlib.util.find_spec("unsloth_zoo").submodule_search_locations
    path = Path(folder, "fused_losses", "fused_linear.py")
    spec = importlib.util.spec_from_file_location("unsloth_fused_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unsloth(context: Context) -> Loss:
    names = ("bias", "logit_scale", "logit_softcapping")
    options = {
        f"{model}_{name}": value
        for model, form in zip(("student", "teacher"), context.problem.forms, strict=True)
        for name, value in zip(names, form, strict=True)
    }
    run = partial(_unsloth_file().fused_linear_jsd, beta=context.job.beta, **options)
    return lambda x: run(x.student, x.student_weight, x.teacher, x.teacher_weight)


def _cross_entropy(context: Context) -> Loss:
    """What a hard label costs with one head; any labels are the same work. Chunked where torch's page advises it."""
    from torch.nn import LinearCrossEntropyOptions

    tokens, size = context.problem.student.shape
    options = LinearCrossEntropyOptions() if tokens >= size else None
    labels = torch.arange(tokens, device=context.problem.student.device) % len(context.problem.student_weight)
    return lambda x: F.linear_cross_entropy(x.student, x.student_weight, labels, options=options)


@dataclass(frozen=True)
class Method:
    """Something to time.

    Attributes:
        title: for tables and legends.
        make: builds the loss for one problem and job.
        package: what must be installed.
        cuda_only: whether it needs a CUDA device.
        compiles: whether its first call for a size compiles.
        jobs: which jobs it can do.
        every_head: whether it knows a head's bias, scale and soft-cap.
        same_loss: whether it computes the job, and not another loss that is shown for its time.
    """

    title: str
    make: Callable[[Context], Loss]
    package: str | None = None
    cuda_only: bool = False
    compiles: bool = False
    jobs: Callable[[Job], bool] = lambda job: True
    every_head: bool = True
    same_loss: bool = True

    def missing(self, device: str, forms: Sequence[Form] = ()) -> str | None:
        """Why it cannot run here, with heads of these forms, or None."""
        if not self.every_head and not all(form.plain for form in forms):
            return "takes no head with bias, scale and soft-cap"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return "needs CUDA" if self.cuda_only and device != "cuda" else None


def _plain(job: Job) -> bool:
    return job.plain


def _forward_kl(job: Job) -> bool:
    return job.plain and job.beta == 0


def _reverse_kl(job: Job) -> bool:
    return job.plain and job.beta == 1


def _linear(job: Job) -> bool:
    return not job.dense


FLOOR = "floor"
_LIGER = {"package": "liger_kernel", "every_head": False}
METHODS = {
    "ours": Method("ours", _ours),
    "tolerance-1e-3": Method("ours, gradient_tolerance 0.001", partial(_ours, gradient_tolerance=1e-3), jobs=_linear),
    "tolerance-1e-2": Method("ours, gradient_tolerance 0.01", partial(_ours, gradient_tolerance=1e-2), jobs=_linear),
    "eager": Method("PyTorch, eager", _eager),
    "compile": Method("PyTorch, torch.compile", _compiled, compiles=True),
    "checkpointed": Method("PyTorch, checkpointed chunks", _checkpointed, jobs=_linear),
    "trl": Method("TRL ChunkedDivergenceFunction", _trl, "trl", jobs=_plain),
    "liger-jsd": Method("Liger fused linear JSD", _liger_jsd, cuda_only=True, jobs=_plain, **_LIGER),
    "liger-kl": Method("Liger fused linear KL", _liger_kl, cuda_only=True, jobs=_forward_kl, **_LIGER),
    "liger-chunked": Method("Liger chunked JSD loss", _liger_chunked, compiles=True, jobs=_plain, **_LIGER),
    "unsloth": Method("Unsloth fused linear JSD", _unsloth, "unsloth_zoo", jobs=_plain),
    "cross-entropy": Method(
        "another loss: F.linear_cross_entropy", _cross_entropy, jobs=_reverse_kl, every_head=False, same_loss=False
    ),
}

#: What says nothing of rows whose tails are no language model's.
TOLERANT = ("tolerance-1e-3", "tolerance-1e-2")
EXACT = tuple(name for name in METHODS if name not in TOLERANT)


def runner(name: str, context: Context) -> Callable[[DenseProblem], None]:
    """Forward and backward of a method (or the floor) as one call on leaves."""
    if name == FLOOR:
        return make_floor(context.problem, context.job)
    loss = METHODS[name].make(context)
    return lambda leaves: loss(leaves).backward()
