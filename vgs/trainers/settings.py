"""The settings of the trainers: TRL's, plus the knobs of Visual Gradient Steering and its relatives."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig

from vgs_kernels import DEFAULT_WORKSPACE_BYTES, VGSObjective, checks

from ..data.degraded import CONTROLS
from ..errors import ConfigError
from ..log import warn_once
from ..models.attention import KERNELS
from ..objectives.definitions import SETTINGS
from ..objectives.eta import ETA_MODES, ETA_PRESETS
from ..objectives.fixed_prior import anchored
from ..objectives.presets import Preset, find_preset
from ..objectives.weighting import LOSS_REDUCTIONS
from .instrument_settings import InstrumentOptions

logger = logging.getLogger(__name__)

PRIORS = ("live", "frozen", "ema")
LOSS_BACKENDS = ("auto", "triton", "torch", "loops")
AT_LEAST_ONE = (
    *("eta_batches", "eta_every", "loss_workspace_bytes", "vocab_size", "max_prompt_length"),
    *("max_tokens_per_pass", "lp_every", "log_overlap"),
)


def view_count(options: Any) -> int:
    """2 where a pass holds the text-only view, else 1. ``options``: a ``VGSConfig``, or anything with its fields."""
    preset = find_preset(options.preset)
    if not preset.steered:
        return 2 if "text" in preset.views else 1
    return 2 if options.log_terms or options.gamma > 0 or options.lam > 0 else 1


def least_pass(options: Any) -> int:
    """The least ``max_tokens_per_pass`` that holds any response allowed, with any prompt allowed; as ``view_count``."""
    # A text-only prompt is at most as long as the prompt with its images.
    return view_count(options) * ((options.max_prompt_length or 0) + (options.max_completion_length or 0))


@dataclass
class VGSOptions(InstrumentOptions):
    """What the trainers' settings share; a mixin in front of a TRL config.

    Args:
        preset: what is minimised, see ``vgs.objectives.presets``: ``"vgs"``, ``"gkd"``, ...
        divergence: fields of ``vgs_kernels.Divergence`` that replace the preset's, such as ``{"top_k": 128}``; not of
            presets that steer, and not its temperature, which is ``loss_temperature``.
        gamma, lam, vds_quantile, adaptive_quantile, detach_prior, schedule, vds_scope: see ``VGSObjective``; of
            presets that steer, others warn of them. One call (``vds_scope="call"``) is one micro-batch on one rank.
            ``schedule`` None: as the preset says, else ``"constant"``.
        gamma_warmup_steps: optimizer steps over which gamma rises from 0, in a line; with any schedule.
        gamma_guard: multiply gamma by a factor that falls to 0 while the student is blind or its language drifts, see
            ``vgs.trainers.gamma_guard``. None: wherever it can be: presets that steer with gamma > 0, the live prior
            and ``log_terms``. A frozen or averaged prior does not feed back on itself and is not guarded.
        eta: scale of the whole loss: a positive number, a preset of the paper by student size (``"paper-2b"`` 0.41,
            ``"paper-4b"`` 0.36), or a way to measure ||grad standard|| / ||grad (standard + gamma * visual)|| (arXiv
            2606.00564, Eq. 15). Over the trainable parameters: ``"measure"``, on the first ``eta_batches`` batches,
            then fixed; ``"exact"``, in every step; ``"tracked"``, in every ``eta_every``-th, smoothed. Over the last
            hidden states: ``"cheap"``, from earlier steps, smoothed. Measuring over parameters needs one process, DDP
            or FSDP2. Where there is nothing to measure (gamma 0, or a preset other than ``"vgs"`` and
            ``"vgs_adaptive"``) it is 1. Where gamma is not whole (warm-up, guard), eta is what belongs to the rest.
        eta_batches: optimizer steps whose batches ``"measure"`` measures.
        eta_every: steps between measurements of ``"tracked"``, 16 if left out; ``"cheap"`` is then compared with the
            parameters' in so many steps, for the log.
        loss_reduction: ``"trajectory"`` averages over the tokens of each response, then over responses (the paper's);
            ``"token"`` averages over all tokens. None: as the preset says, else ``"trajectory"``.
        loss_backend, loss_workspace_bytes: passed to the fused loss.
        gradient_tolerance: share of the L1 norm of a token's logit gradient that the fused loss may leave out of its
            products, in [0, 1), see ``fused_linear_vgs_loss``; 0: nothing. What it leaves out is logged.
        loss_temperature: divides the logits in the loss; None: as ``temperature``, which the student is sampled with.
        log_overlap: log which share of their k likeliest tokens student and teacher have in common, for this k; None
            saves a product with both heads (``vgs.models.overlap``).
        log_terms: log every term of the steered objective. False saves work where the loss alone does not need them,
            and then nothing is watched for collapse.
        vocab_size: number of leading vocabulary columns to use, where both heads are padded alike; None uses all.
        max_prompt_length: longest prompt in tokens, image tokens included. A longer one is an error, never truncated;
            ``vgs train`` filters the data first.
        share_prefix: responses to one prompt share it, and its images, in a packed pass.
        max_tokens_per_pass: most tokens, prompts and both views included, that run through a model at once (padding
            aside, where a family is not packed); a micro-batch is split into as many passes as it takes, with the same
            loss and gradient. None: a micro-batch is one pass.
        packed_attention: kernel of packed passes, see ``vgs.models.attention.RowLayout``.
        lp_every: take the language preservation term in every so manieth optimizer step, that many times as strong.
            Between them the student's text-only view needs no backward.
        freeze_vision, freeze_embeddings: keep the student's vision tower or input embeddings (and with them a tied
            output head) as they are.
        teacher_offload: keep the teacher's weights, but for its head, in host memory while the student runs. Not under
            DeepSpeed, which shards the teacher and offloads by itself.
        teacher_reload: read each teacher from disk for each of its phases and give it up after them; only the heads
            stay. Excludes ``teacher_offload``.
        teacher_column: of several teachers, the column that names each row's.
        prior: where the prior p_x inside q* comes from, of presets that steer: the student as it is (``"live"``), as it
            was at the start (``"frozen"``) or its average (``"ema"``), see ``vgs.trainers.prior``.
        prior_decay: of the average, per optimizer step.
        control_kind: how images are degraded in the control view, see ``vgs.data.degraded``; None: as the preset says.
    """

    preset: str = field(default="vgs", metadata={"help": "What is minimised: a name of vgs.objectives.presets."})
    divergence: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fields of Divergence that replace the preset's."}
    )
    gamma: float = field(default=2.0, metadata={"help": "Weight of the visual term."})
    gamma_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps over which gamma rises from 0."})
    gamma_guard: bool | None = field(
        default=None, metadata={"help": "Lower gamma while the student is blind; left out: wherever it can be."}
    )
    lam: float = field(default=0.01, metadata={"help": "Weight of the gated language preservation term."})
    vds_quantile: float = field(default=0.7, metadata={"help": "VDS quantile above which language is preserved."})
    adaptive_quantile: float = field(default=0.4, metadata={"help": "Lower quantile of the adaptive schedule."})
    detach_prior: bool = field(default=True, metadata={"help": "Treat the prior inside q* as a constant."})
    schedule: str | None = field(default=None, metadata={"help": '"constant" or "adaptive" gamma.'})
    vds_scope: str = field(default="call", metadata={"help": 'Quantile scope: "call", "ranks" or "trajectory".'})
    eta: float | str = field(
        default="measure",
        metadata={"help": 'A number, "paper-2b", "paper-4b", "measure", "exact", "tracked" or "cheap".'},
    )
    eta_every: int | None = field(default=None, metadata={"help": "Steps between measurements of eta."})
    eta_batches: int = field(default=1, metadata={"help": 'Batches that eta="measure" measures.'})
    loss_reduction: str | None = field(default=None, metadata={"help": '"trajectory" or "token".'})
    loss_backend: str = field(default="auto", metadata={"help": '"auto", "triton", "torch" or "loops".'})
    loss_workspace_bytes: int = field(
        default=DEFAULT_WORKSPACE_BYTES, metadata={"help": "Scratch memory of the loss, in bytes."}
    )
    gradient_tolerance: float = field(
        default=0.0, metadata={"help": "Share of a token's logit gradient that its products may leave out; 0: nothing."}
    )
    loss_temperature: float | None = field(
        default=None, metadata={"help": "Divides the logits in the loss; left out: as temperature, that of sampling."}
    )
    log_overlap: int | None = field(
        default=None, metadata={"help": "Log how many of the so many likeliest tokens student and teacher share."}
    )
    log_terms: bool = field(default=True, metadata={"help": "Log every term of the steered objective."})
    vocab_size: int | None = field(default=None, metadata={"help": "Leading vocabulary columns to use."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    share_prefix: bool = field(default=True, metadata={"help": "Responses to one prompt share it in a pass."})
    max_tokens_per_pass: int | None = field(default=None, metadata={"help": "Most tokens of one pass."})
    packed_attention: str = field(default="auto", metadata={"help": '"auto", "dense", "flex" or "varlen".'})
    lp_every: int = field(default=1, metadata={"help": "Steps between language preservation terms."})
    freeze_vision: bool = field(default=False, metadata={"help": "Keep the student's vision tower."})
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the student's input embeddings."})
    teacher_offload: bool = field(default=False, metadata={"help": "Keep the teacher in host memory between phases."})
    teacher_reload: bool = field(default=False, metadata={"help": "Read the teacher from disk for each phase."})
    teacher_column: str | None = field(default=None, metadata={"help": "Column that names each row's teacher."})
    prior: str = field(default="live", metadata={"help": 'The prior of q*: "live", "frozen" or "ema".'})
    prior_decay: float = field(default=0.995, metadata={"help": "Of the averaged prior, per step."})
    control_kind: str | None = field(default=None, metadata={"help": '"black", "pixelated" or "noise".'})

    def __post_init__(self) -> None:
        self._resolve(find_preset(self.preset))
        super().__post_init__()
        for name, choices in (
            ("loss_reduction", LOSS_REDUCTIONS),
            ("loss_backend", LOSS_BACKENDS),
            ("packed_attention", KERNELS),
            ("control_kind", (None, *CONTROLS)),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(choice for choice in choices if choice is not None)
                raise ConfigError(f"{name} must be one of {expected}, got {getattr(self, name)!r}.")
        checks.number("loss_temperature", self.loss_temperature, "> 0", optional=True)
        checks.number("gradient_tolerance", self.gradient_tolerance, "in [0, 1)")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}.")
        checks.integer("gamma_warmup_steps", self.gamma_warmup_steps, ">= 0")
        self._warn_of_unread()
        if self.eta_every is not None and self.eta not in ("tracked", "cheap"):
            warn_once(logger, f"eta_every={self.eta_every} is without effect: eta={self.eta!r}, not tracked or cheap.")
        if self.gamma_guard and (why := self.unguarded) and find_preset(self.preset).steered:
            warn_once(logger, f"gamma_guard=True is without effect: {why}.")
        if getattr(self.preset_in_force.weighting, "within_response", False) and self.loss_reduction != "trajectory":
            raise ConfigError(
                f"preset={self.preset!r} weighs the tokens of a response among themselves and needs "
                f'loss_reduction="trajectory", got {self.loss_reduction!r}.'
            )
        if self.teacher_reload and self.teacher_offload:
            raise ConfigError("teacher_reload and teacher_offload exclude each other: from disk, or from host memory.")
        self._check_prior()
        self._check_instruments(self.preset_in_force)
        self._check_budget()
        fixed_eta = self.fixed_eta
        self.objective(1.0 if fixed_eta is None else fixed_eta)  # validates its fields

    def _resolve(self, preset: Preset) -> None:
        """What is left open, from the preset."""
        self.preset = preset.name
        if self.eta == "tracked" and self.eta_every is None and preset.steered:
            self.eta_every = 16
        if self.divergence is not None and not isinstance(self.divergence, Mapping):
            raise ConfigError(f"divergence must be a section of keys, such as {{top_k: 128}}, got {self.divergence!r}.")
        if self.loss_reduction is None:
            self.loss_reduction = preset.settings.get("loss_reduction", "trajectory")
        if self.schedule is None:
            self.schedule = preset.schedule or "constant"
        if preset.schedule not in (None, self.schedule):
            raise ConfigError(
                f"schedule must be {preset.schedule!r} or left out for preset={self.preset!r}, got {self.schedule!r}."
            )

    def _warn_of_unread(self) -> None:
        """Name the settings that would change another preset."""
        preset = find_preset(self.preset)
        defaults = {x.name: x.default for x in dataclasses.fields(self)} | {"schedule": preset.schedule or "constant"}
        unread = {name: getattr(self, name) for name in sorted(SETTINGS) if not preset.reads(name)}
        if changed := [f"{name}={value!r}" for name, value in unread.items() if value != defaults[name]]:
            warn_once(logger, f"preset={self.preset!r} does not read {', '.join(changed)}: without effect.")

    def _check_prior(self) -> None:
        if self.prior not in PRIORS:
            raise ConfigError(f"prior must be one of {', '.join(PRIORS)}, got {self.prior!r}.")
        if not 0 <= self.prior_decay < 1:
            raise ConfigError(f"prior_decay must be in [0, 1), got {self.prior_decay}.")
        if self.prior != "live" and not find_preset(self.preset).steered:
            raise ConfigError(f"prior={self.prior!r} belongs to presets that steer; {self.preset!r} has none.")
        if self.prior != "live" and not self.detach_prior:
            raise ConfigError(f"detach_prior=False needs prior='live', got {self.prior!r}: a copy has no gradient.")

    def _check_budget(self) -> None:
        if self.max_tokens_per_pass is None:
            return
        views, needed = view_count(self), least_pass(self)
        if needed > self.max_tokens_per_pass:
            prompt = f" and max_prompt_length={self.max_prompt_length}" if self.max_prompt_length else ""
            raise ConfigError(
                f"max_tokens_per_pass={self.max_tokens_per_pass} is too small: one response of "
                f"max_completion_length={self.max_completion_length} tokens{prompt} may need {needed} in {views} "
                f"view{'s' if views > 1 else ''}."
            )

    @property
    def preset_in_force(self) -> Preset:
        """The preset with this run's divergence."""
        preset = find_preset(self.preset)
        if self.prior != "live":
            preset = anchored(preset)
        return preset.configured(self.temperature_of_loss, **self._divergence_changes())

    @property
    def unguarded(self) -> str | None:
        """Why nothing guards gamma, in words; None where it is guarded."""
        if self.gamma_guard is False:
            return "gamma_guard=False"
        if not find_preset(self.preset).steered:
            return f"preset={self.preset!r} does not steer"
        if self.gamma == 0:
            return "gamma is 0"
        if self.prior != "live":
            return f"prior={self.prior!r} does not feed back on itself"
        return None if self.log_terms else "log_terms=False keeps its two views from being compared"

    @property
    def guards_gamma(self) -> bool:
        """Whether the guard is on."""
        return self.unguarded is None

    @property
    def temperature_of_loss(self) -> float:
        """What divides the logits in the loss."""
        return self.temperature if self.loss_temperature is None else self.loss_temperature

    def _divergence_changes(self) -> dict[str, Any]:
        return dict(self.divergence or {})

    @property
    def fixed_eta(self) -> float | None:
        """eta where it is known before training; None when it is to be measured.

        Raises:
            ConfigError: ``eta`` is a string that is neither a preset nor a way to measure nor a number.
        """
        if self.eta in ETA_MODES:
            # Without a visual term both gradients are the same.
            return 1.0 if self.gamma == 0 or not find_preset(self.preset).steered else None
        if self.eta in ETA_PRESETS:
            return ETA_PRESETS[self.eta]
        try:
            return float(self.eta)
        except (TypeError, ValueError):
            names = ", ".join(f'"{name}"' for name in (*ETA_PRESETS, *ETA_MODES))
            raise ConfigError(f"eta must be a number or one of {names}, got {self.eta!r}.") from None

    def objective(self, eta: float, gamma: float | None = None) -> VGSObjective:
        """The validated objective of one loss call; ``gamma`` None: as set."""
        return VGSObjective(
            gamma=self.gamma if gamma is None else gamma,
            lam=self.lam,
            vds_quantile=self.vds_quantile,
            eta=eta,
            temperature=self.temperature_of_loss,
            detach_prior=self.detach_prior,
            schedule=self.schedule,
            adaptive_quantile=self.adaptive_quantile,
            vds_scope=self.vds_scope,
        )


@dataclass
class VGSConfig(VGSOptions, DistillationConfig):
    """Settings of ``VGSTrainer``: those of ``VGSOptions`` and everything of ``trl.DistillationConfig``.

    Plain on-policy distillation is the preset ``"opd"``.

    Args:
        beta: of the preset ``"gkd"``, 0.5 there if left out: 0 is the forward and 1 the reverse KL.
        eval_greedy: decode greedily during evaluation.
        on_policy_fraction: share of the prompts, in [0, 1], that the student answers; to the others it learns from
            recorded responses (a column ``responses``, or a teacher's cache), see ``vgs.trainers.off_policy``.
        num_generations: responses sampled to each prompt of a training batch. ``per_device_train_batch_size *
            gradient_accumulation_steps`` counts responses and must be a multiple of it.

    Raises:
        ConfigError: an unknown name, a number outside its range, or settings that exclude each other.
    """

    beta: float | None = field(default=None, metadata={"help": "Of the preset gkd: 0 forward KL, 1 reverse KL."})
    eval_greedy: bool = field(default=True, metadata={"help": "Decode greedily during evaluation."})
    num_generations: int = field(default=1, metadata={"help": "Responses sampled to each prompt."})
    on_policy_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of prompts that the student answers; others have recorded responses."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy_fraction <= 1:
            raise ConfigError(f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}.")
        least = find_preset(self.preset).generations
        if self.num_generations < least:
            raise ConfigError(
                f"num_generations must be >= {least} for preset={self.preset!r}, got {self.num_generations}."
            )
        responses = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if responses % self.num_generations:
            raise ConfigError(
                f"num_generations={self.num_generations} must divide per_device_train_batch_size * "
                f"gradient_accumulation_steps = {responses}, so that all responses to a prompt are on one process."
            )

    def _resolve(self, preset: Preset) -> None:
        super()._resolve(preset)
        checks.number("beta", self.beta, optional=True)
        if preset.name == "gkd":
            knob = checks.number("beta", (self.divergence or {}).get("beta", self.beta), optional=True)
            if self.beta not in (None, knob):
                raise ConfigError(f"beta={self.beta} and divergence={self.divergence} differ; keep one.")
            self.beta = preset.divergence.beta if knob is None else knob
        elif self.beta not in (None, 1.0):
            raise ConfigError(
                f"beta must be 1.0, got {self.beta}: it belongs to the preset 'gkd', and {preset.name!r} would "
                "ignore it. The presets' own settings are gamma, lam and divergence."
            )
        else:
            self.beta = 1.0  # the host wants a number

    def _divergence_changes(self) -> dict[str, Any]:
        changes = super()._divergence_changes()
        return {"beta": self.beta, **changes} if self.preset == "gkd" else changes
