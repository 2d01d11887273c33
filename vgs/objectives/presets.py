"""Visual Gradient Steering and its relatives, each by the name that a config has for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from vgs_kernels import Divergence

from ..errors import ConfigError
from .definitions import PRIVILEGED, TEACHERS, VIEWS, Addend, LanguageSteered, Preset, Steered
from .weighting import EvidenceContrast, VisualAdvantage

__all__ = ["PRESETS", "TEACHERS", "VIEWS", "ConfigError", "Preset", "find_preset"]

_ALL = (
    Preset(
        name="gkd",
        paper="2306.13649",
        equation="Eq. 1: beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p",
        divergence=Divergence("jsd", beta=0.5),
        settings={"loss_reduction": "token"},
    ),
    Preset(
        name="opd",
        paper="2606.00564",
        equation="Eq. 3-4: KL(p || q), plain on-policy distillation",
        # Thinking Machines' on-policy distillation is its one-sample estimate, divergence: sampled_reverse_kl.
    ),
    # The loss is that of the released code; its top-k variant is left out.
    Preset(
        name="opsd",
        paper="2601.18734",
        equation="sum_v min(q_v log(q_v / p_v), 0.05), the teacher sees privileged context",
        target=(PRIVILEGED,),
        divergence=Divergence("forward_kl", clip=0.05),
        teacher="frozen",
    ),
    Preset(
        name="visual_opsd",
        paper="2606.18974",
        equation="Eq. 7: JSD_0.5 on the teacher's top 256, entries clipped at 0.05; the teacher sees privileged images",
        target=(PRIVILEGED,),
        divergence=Divergence("jsd", beta=0.5, support="teacher_top_k", top_k=256, clip=0.05),
        teacher="ema",
        ema_decay=0.995,
    ),
    # The paper's weights min(p(y) / p_old(y), 2) are 1 here: the trainer takes one optimizer step per rollout.
    Preset(
        name="vision_opd",
        paper="2605.18740",
        equation="JSD_0.5 on the student's top 100 and a tail; the teacher sees a crop",
        target=(PRIVILEGED,),
        divergence=Divergence("jsd", beta=0.5, support="student_top_k", top_k=100),
        teacher="ema",
        ema_decay=0.95,
        settings={"loss_reduction": "token"},
    ),
    Preset(
        name="va_opd",
        paper="2605.21924",
        equation="sum_k w_k * (0.5 * mean over the top 20 % + 0.5 * mean over the rest) of KL(p || q)",
        weighting=VisualAdvantage(),
        control="pixelated",
        generations=2,
        settings={"num_generations": 4},
    ),
    Preset(
        name="v_zero",
        paper="2606.25319",
        equation="clip(1 + z, 0, 2) * (log p(y) - log q(y)), clipped at 10, with the policy gradient",
        divergence=Divergence("sampled_reverse_kl", token_clip=10.0),
        weighting=EvidenceContrast(),
        control="black",
        generations=2,
        settings={"num_generations": 8, "loss_reduction": "token"},
    ),
    # Left out of the paper's: the end token, which it does not contrast, and its averaged teacher (here: any model).
    # T = 2 is the factor T^2 alone, as in the released code: logits and support have the temperature of the run.
    Preset(
        name="vcsd",
        paper="2607.21556",
        equation="T^2 * KL(q* || p), q* = softmax(2 t - t_black) on {v: q(v) >= 0.1 max q}, T = 2",
        target=(Addend(2.0, "teacher", "image"), Addend(-1.0, "teacher", "control")),
        divergence=Divergence("forward_kl", support="plausible", plausibility=0.1),
        scale=4.0,
        control="black",
    ),
    Steered(
        name="vgs",
        paper="2606.00564",
        equation="Eq. 17-18: eta * (KL(p || q) + gamma * KL(p || q*) + lam * 1[vds > Q_0.7] * KL(p_x || q_x))",
    ),
    Steered(
        name="vgs_adaptive",
        paper="2606.00564",
        equation="Eq. 24-25: as vgs, gamma 0 up to Q_0.4 of vds, gamma / 2 up to Q_0.7, gamma above",
        schedule="adaptive",
    ),
    LanguageSteered(
        name="language_steering",
        paper="2606.00564",
        equation="Eq. 19-21: eta * (KL(p || q) + gamma * KL(p_x || q_x) + lam * 1[vds > Q_0.7] * KL(p || q*))",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def find_preset(name: str, key: str = "preset") -> Preset:
    """A preset by its name, in any case.

    Args:
        name: of ``PRESETS``.
        key: what the error calls it.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    folded = str(name).casefold()
    if folded in PRESETS:
        return PRESETS[folded]
    nearest = difflib.get_close_matches(folded, PRESETS, n=1, cutoff=0.5) if isinstance(name, str) else []
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(PRESETS)}."
    raise ConfigError(f"{key} {name!r} is not known; {hint}")
