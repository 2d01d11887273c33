"""VGSConfig: TRL's distillation settings plus the knobs of Visual Gradient Steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig

from vgs_kernels import VGSObjective
from vgs_kernels.functional import DEFAULT_WORKSPACE_BYTES

from .attention import KERNELS
from .steering import ETA_PRESETS

LOSS_REDUCTIONS = ("trajectory", "token")
LOSS_BACKENDS = ("auto", "triton", "torch")
AT_LEAST_ONE = (
    *("eta_batches", "loss_workspace_bytes", "vocab_size", "max_prompt_length"),
    *("num_generations", "max_tokens_per_pass", "lp_every"),
)


def view_count(options: Any) -> int:
    """2 where anything needs the text-only view, else 1. ``options``: a ``VGSConfig``, or anything with its fields."""
    return 2 if options.log_terms or options.gamma > 0 or options.lam > 0 else 1


def least_pass(options: Any) -> int:
    """The least ``max_tokens_per_pass`` that holds any response allowed, with any prompt allowed; as ``view_count``."""
    # A text-only prompt is at most as long as the prompt with its images.
    return view_count(options) * ((options.max_prompt_length or 0) + (options.max_completion_length or 0))


@dataclass
class VGSConfig(DistillationConfig):
    """Settings of ``VGSTrainer``; everything of ``trl.DistillationConfig`` applies except ``beta`` (the divergence is
    the reverse KL). Plain on-policy distillation is ``gamma=0, lam=0, eta=1``.

    Args:
        gamma, lam, vds_quantile, adaptive_quantile, detach_prior, schedule, vds_scope: see ``VGSObjective``. One call
            (``vds_scope="call"``) is one micro-batch on one rank.
        eta: scale of the whole loss: a positive number, a preset of the paper by student size (``"paper-2b"`` 0.41,
            ``"paper-4b"`` 0.36), or ``"measure"``: ||grad standard|| / ||grad (standard + gamma * visual)|| over the
            trainable parameters (arXiv 2606.00564, Eq. 15) on the first ``eta_batches`` batches, then fixed, stored in
            checkpoints. Measuring needs whole parameters: one process or DDP.
        eta_batches: optimizer steps whose batches are measured.
        loss_reduction: ``"trajectory"`` averages over the tokens of each response, then over responses (the paper's);
            ``"token"`` averages over all tokens.
        loss_backend, loss_workspace_bytes: passed to the fused loss.
        log_terms: log every term of the objective. False saves work where the loss alone does not need them.
        vocab_size: number of leading vocabulary columns to use, where both heads are padded alike; None uses all.
        max_prompt_length: longest prompt in tokens, image tokens included. A longer one is an error, never truncated;
            ``vgs train`` filters the data first.
        eval_greedy: decode greedily during evaluation.
        num_generations: responses sampled to each prompt of a training batch. ``per_device_train_batch_size *
            gradient_accumulation_steps`` counts responses and must be a multiple of it.
        share_prefix: responses to one prompt share it, and its images, in a packed pass.
        max_tokens_per_pass: most tokens, prompts and both views included, that run through a model at once (padding
            aside, where a family is not packed); a micro-batch is split into as many passes as it takes, with the same
            loss and gradient. None: a micro-batch is one pass.
        packed_attention: kernel of packed passes, see ``vgs.attention.RowLayout``.
        lp_every: take the language preservation term in every so manieth optimizer step, that many times as strong.
            Between them the student's text-only view needs no backward.
        freeze_vision, freeze_embeddings: keep the student's vision tower or input embeddings (and with them a tied
            output head) as they are.
        teacher_offload: keep the teacher's weights, but for its head, in host memory while the student runs. Not under
            DeepSpeed, which shards the teacher and offloads by itself.
    """

    gamma: float = field(default=2.0, metadata={"help": "Weight of the visual term."})
    lam: float = field(default=0.01, metadata={"help": "Weight of the gated language preservation term."})
    vds_quantile: float = field(default=0.7, metadata={"help": "VDS quantile above which language is preserved."})
    adaptive_quantile: float = field(default=0.4, metadata={"help": "Lower quantile of the adaptive schedule."})
    detach_prior: bool = field(default=True, metadata={"help": "Treat the prior inside q* as a constant."})
    schedule: str = field(default="constant", metadata={"help": '"constant" or "adaptive" gamma.'})
    vds_scope: str = field(default="call", metadata={"help": 'Quantile scope: "call", "ranks" or "trajectory".'})
    eta: float | str = field(default="measure", metadata={"help": 'A number, "paper-2b", "paper-4b" or "measure".'})
    eta_batches: int = field(default=1, metadata={"help": 'Batches that eta="measure" measures.'})
    loss_reduction: str = field(default="trajectory", metadata={"help": '"trajectory" or "token".'})
    loss_backend: str = field(default="auto", metadata={"help": '"auto", "triton" or "torch".'})
    loss_workspace_bytes: int = field(
        default=DEFAULT_WORKSPACE_BYTES, metadata={"help": "Scratch memory of the loss, in bytes."}
    )
    log_terms: bool = field(default=True, metadata={"help": "Log every term of the objective."})
    vocab_size: int | None = field(default=None, metadata={"help": "Leading vocabulary columns to use."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    eval_greedy: bool = field(default=True, metadata={"help": "Decode greedily during evaluation."})
    num_generations: int = field(default=1, metadata={"help": "Responses sampled to each prompt."})
    share_prefix: bool = field(default=True, metadata={"help": "Responses to one prompt share it in a pass."})
    max_tokens_per_pass: int | None = field(default=None, metadata={"help": "Most tokens of one pass."})
    packed_attention: str = field(default="auto", metadata={"help": '"auto", "dense", "flex" or "varlen".'})
    lp_every: int = field(default=1, metadata={"help": "Steps between language preservation terms."})
    freeze_vision: bool = field(default=False, metadata={"help": "Keep the student's vision tower."})
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the student's input embeddings."})
    teacher_offload: bool = field(default=False, metadata={"help": "Keep the teacher in host memory between phases."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta != 1.0:
            raise ValueError(
                f"beta must be 1.0, got {self.beta}: Visual Gradient Steering minimises the reverse KL and would "
                "ignore beta. Use gamma and lam, or trl.DistillationTrainer for other divergences."
            )
        for name, choices in (
            ("loss_reduction", LOSS_REDUCTIONS),
            ("loss_backend", LOSS_BACKENDS),
            ("packed_attention", KERNELS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        self._check_batches()
        fixed_eta = self.fixed_eta
        self.objective(1.0 if fixed_eta is None else fixed_eta)  # validates its fields

    def _check_batches(self) -> None:
        responses = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if responses % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide per_device_train_batch_size * "
                f"gradient_accumulation_steps = {responses}, so that all responses to a prompt are on one process."
            )
        if self.max_tokens_per_pass is None:
            return
        views, needed = view_count(self), least_pass(self)
        if needed > self.max_tokens_per_pass:
            prompt = f" and max_prompt_length={self.max_prompt_length}" if self.max_prompt_length else ""
            raise ValueError(
                f"max_tokens_per_pass={self.max_tokens_per_pass} is too small: one response of "
                f"max_completion_length={self.max_completion_length} tokens{prompt} may need {needed} in {views} "
                f"view{'s' if views > 1 else ''}."
            )

    @property
    def fixed_eta(self) -> float | None:
        """eta where it is known before training; None when it is to be measured.

        Raises:
            ValueError: ``eta`` is a string that is neither a preset nor ``"measure"`` nor a number.
        """
        if self.eta == "measure":
            return 1.0 if self.gamma == 0 else None  # without a visual term both gradients are the same
        if self.eta in ETA_PRESETS:
            return ETA_PRESETS[self.eta]
        try:
            return float(self.eta)
        except (TypeError, ValueError):
            presets = ", ".join(f'"{name}"' for name in ETA_PRESETS)
            raise ValueError(f'eta must be a number, {presets} or "measure", got {self.eta!r}.') from None

    def objective(self, eta: float) -> VGSObjective:
        """The validated objective of one loss call."""
        return VGSObjective(
            gamma=self.gamma,
            lam=self.lam,
            vds_quantile=self.vds_quantile,
            eta=eta,
            temperature=self.temperature,
            detach_prior=self.detach_prior,
            schedule=self.schedule,
            adaptive_quantile=self.adaptive_quantile,
            vds_scope=self.vds_scope,
        )
