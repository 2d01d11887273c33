"""Settings of reinforcement learning with a distillation as its auxiliary loss, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from ..errors import ConfigError
from ..evaluation.rewards import check_rewards
from ..objectives.presets import PRESETS, Preset
from .policy_scoring import LOSS_TYPES
from .settings import VGSOptions

#: Settings of the host that change its loss in ways that this one does not follow, and their neutral values.
NEUTRAL = {
    "beta": 0.0,
    "delta": None,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "sync_ref_model": False,
    "cast_lm_head_to_fp32": False,
}


def mixes(preset: Preset) -> bool:
    """Whether a preset's divergence can go with a policy gradient."""
    divergence = preset.divergence
    return (
        preset.teacher == "separate"
        and preset.views <= {"image", "text"}
        and preset.weighting is None
        and divergence.support == "full"
    )


@dataclass
class VGSGRPOConfig(VGSOptions, GRPOConfig):
    """Settings of ``VGSGRPOTrainer``: those of ``VGSOptions`` and of ``trl.GRPOConfig``.

    The loss is (1 - alpha) * GRPO + alpha * distillation (arXiv 2606.00564, Eq. 22), without KL term and eta.
    ``preset`` says what is distilled: ``"vgs"``, or ``"opd"`` for plain distillation. ``loss_type`` is ``"grpo"``,
    ``"bnpo"``, ``"dr_grpo"`` or ``"dapo"`` and, like ``scale_rewards``, ``epsilon``, ``num_iterations``,
    ``mask_truncated_completions`` and vLLM's importance sampling, as in TRL; settings of other policy losses are
    refused.

    Args:
        alpha: weight of the distillation, in [0, 1]. 0 is GRPO and needs no teacher, 1 is distillation.
        eta: 1, for alpha alone scales the distillation.
        rewards: names in ``vgs.evaluation.rewards``, weighted by ``reward_weights``; None is ``["exact_match"]``.
        eval_greedy: decode greedily during evaluation, one response to each prompt.
        teacher_model_init_kwargs: of ``from_pretrained``, for a teacher that is given by its id.

    Raises:
        ConfigError: as ``VGSConfig``, or a setting of TRL's that the fused loss cannot honour.
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    alpha: float = field(default=0.3, metadata={"help": "Weight of the distillation."})
    eta: float | str = field(default=1.0, metadata={"help": "1: the distillation is scaled by alpha alone."})
    rewards: list[str] | None = field(default=None, metadata={"help": "Names of vgs.evaluation.rewards."})
    eval_greedy: bool = field(default=True, metadata={"help": "Decode greedily during evaluation."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for the teacher."}
    )

    def __post_init__(self) -> None:
        if self.eval_greedy:
            if (self.num_generations_eval or 1) > 1:
                raise ConfigError(
                    f"num_generations_eval must be 1 with eval_greedy=True, got {self.num_generations_eval}: greedy "
                    "responses to a prompt are all the same."
                )
            self.num_generations_eval = 1
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must lie in [0, 1], got {self.alpha}.")
        if self.alpha == 0:
            self.teacher_column = None  # nobody is asked
        check_rewards(["exact_match"] if self.rewards is None else self.rewards)
        self._check_policy()
        self._check_distillation()
        responses = self.per_device_train_batch_size * self.steps_per_generation
        if responses % self.num_generations:
            raise ConfigError(
                f"num_generations={self.num_generations} must divide per_device_train_batch_size * "
                f"steps_per_generation = {responses}, so that all responses to a prompt are on one process."
            )
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns must be False, got True: rewards read the other columns.")
        cycle = self.steps_per_generation * self.num_iterations
        steps = self.save_steps * self.gradient_accumulation_steps
        if self.save_strategy == "steps" and self.save_steps >= 1 and steps % cycle:
            raise ConfigError(
                f"save_steps={self.save_steps} must be a multiple of {cycle / self.gradient_accumulation_steps:g}, the "
                "optimizer steps on one sampled batch, which checkpoints do not hold."
            )

    def _check_policy(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}.")
        for name, neutral in NEUTRAL.items():
            if (value := getattr(self, name)) != neutral:
                raise ConfigError(
                    f"{name} must be {neutral!r}, got {value!r}: the fused policy gradient has no such term. Use "
                    "trl.GRPOTrainer for it."
                )

    def _check_distillation(self) -> None:
        if not mixes(self.preset_in_force):
            able = ", ".join(name for name, preset in PRESETS.items() if mixes(preset))
            raise ConfigError(
                f"preset={self.preset!r} with divergence={self.divergence!r} cannot be mixed with a policy gradient, "
                f"which needs the whole vocabulary and no further views; expected one of {able}."
            )
        if self.fixed_eta != 1:
            raise ConfigError(f"eta must be 1, got {self.eta!r}: the distillation is scaled by alpha alone.")
        if self.prior != "live":
            raise ConfigError(f"prior must be 'live', got {self.prior!r}: this trainer keeps no copy of the student.")
        if self.lp_every != 1:
            raise ConfigError(f"lp_every must be 1, got {self.lp_every}: several steps may use one sampled batch.")
