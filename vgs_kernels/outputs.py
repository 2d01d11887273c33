"""What the public functions return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor


@dataclass
class VGSOutput:
    """Loss and detached per-token terms of one call (names as in :class:`VGSObjective`; nats).

    Attributes:
        loss: 0-d, or one for each token with ``reduction="none"``; carries gradient.
        standard, visual, language, vds: [...] divergences; None if the call did not form them.
        gate: [...] bool, whether language is preserved on the token.
        entropy: [...] entropy of p_I.
        student_vds: [...] KL(p_I || p_x), the student's own visual dependency: near 0, the student does not look.
        target_logps: [...] log p_I of ``target_ids``.
        policy: [...] values of the policy term, before its weights.
        counted: [...] bool, the tokens that take part: neither ignored nor of weight 0; None: all.
    """

    loss: Tensor
    standard: Tensor | None = None
    visual: Tensor | None = None
    language: Tensor | None = None
    vds: Tensor | None = None
    gate: Tensor | None = None
    entropy: Tensor | None = None
    student_vds: Tensor | None = None
    target_logps: Tensor | None = None
    policy: Tensor | None = None
    counted: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Loss and unweighted means over the tokens that take part (0 for none), as detached 0-d tensors."""
        left_out = ("loss", "target_logps", "counted")
        names = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        terms = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.counted is None:
            means = {name: x.float().sum() / max(x.numel(), 1) for name, x in terms.items()}
        else:
            count = self.counted.sum().clamp(min=1)
            means = {name: x.float().masked_fill(~self.counted, 0).sum() / count for name, x in terms.items()}
        return {"loss": self.loss.detach().sum(), **means}


@dataclass
class DivergenceOutput:
    """Result of one call.

    Attributes:
        loss: 0-d, or one for each token with ``reduction="none"``; carries gradient.
        divergence: [...] values as they enter the loss, before weights; detached, as all that follow.
        entropy: [...] of the student, in nats (of the renormalised student, where the support renormalises it).
        target_logps: [...] log-probabilities of ``target_ids``, likewise.
        policy: [...] values of the policy term, before its weights.
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None = None
    policy: Tensor | None = None
