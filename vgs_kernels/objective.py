"""The knobs of Visual Gradient Steering (arXiv 2606.00564), validated in one place."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks

SCHEDULES = ("constant", "adaptive")
VDS_SCOPES = ("call", "ranks", "trajectory")


@dataclass(frozen=True)
class VGSObjective:
    """Settings of the VGS loss of one call.

    With p_I, p_x the student and q_I, q_x the teacher with and without the image, per token (Eq. 3-18)::

        standard = KL(p_I || q_I)
        visual   = KL(p_I || q*),   log q* = log p_x + log q_I - log q_x - log Z*
        language = KL(p_x || q_x)
        vds      = KL(q_I || q_x)                       # visual dependency score
        loss     = sum_n weight_n * eta * (standard + gamma_n * visual + lam * 1[vds > Q] * language)

    Attributes:
        gamma: weight of the visual term, >= 0 (paper: 2).
        lam: weight of the gated language preservation term, >= 0 (paper: 0.01).
        vds_quantile: quantile Q of ``vds`` above which language is preserved, in [0, 1] (paper: 0.7).
        eta: scale of the whole loss, > 0, so that gamma turns the gradient's direction and not its length (Eq. 15;
            paper: 0.41 for a 2B student, 0.36 for 4B).
        temperature: divides the logits of all four rows, > 0; no T^2 factor is added.
        detach_prior: whether p_x inside q* is a constant (the paper does not say).
        schedule: ``"constant"``, or ``"adaptive"``: gamma_n is 0 where vds <= Q_low, gamma / 2 up to Q, gamma above
            (Eq. 24-25).
        adaptive_quantile: the quantile Q_low of the adaptive schedule, in [0, ``vds_quantile``] (paper: 0.4).
        vds_scope: tokens that the quantiles are of: this ``"call"``, all data-parallel ``"ranks"``, or each
            ``"trajectory"``.

    Raises:
        ValueError, TypeError: naming the setting, what came and what was expected.
    """

    gamma: float = 2.0
    lam: float = 0.01
    vds_quantile: float = 0.7
    eta: float = 1.0
    temperature: float = 1.0
    detach_prior: bool = True
    schedule: str = "constant"
    adaptive_quantile: float = 0.4
    vds_scope: str = "call"

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            checks.number(name, getattr(self, name), ">= 0")
        for name in ("eta", "temperature"):
            checks.number(name, getattr(self, name), "> 0")
        for name in ("vds_quantile", "adaptive_quantile"):
            checks.number(name, getattr(self, name), "in [0, 1]")
        if self.schedule == "adaptive" and self.adaptive_quantile > self.vds_quantile:
            raise ValueError(
                f"adaptive_quantile must not exceed vds_quantile ({self.vds_quantile}), got {self.adaptive_quantile}."
            )
        checks.instance("detach_prior", self.detach_prior, bool)
        checks.choice("schedule", self.schedule, SCHEDULES)
        checks.choice("vds_scope", self.vds_scope, VDS_SCOPES)

    @property
    def kappa(self) -> float:
        """gamma / (1 + gamma): the prior correction's weight in the composed target.

        With q* detached, standard + gamma * visual = (1 + gamma) * KL(p_I || q~) + a constant without gradient, where
        q~ = softmax(t + kappa * (a - w)) over the logits t (teacher), a (student) and w (teacher), both text-only.
        """
        return self.gamma / (1.0 + self.gamma)

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The VDS quantiles the objective needs: (Q,) or, for the adaptive schedule, (Q_low, Q)."""
        return (self.adaptive_quantile, self.vds_quantile) if self.schedule == "adaptive" else (self.vds_quantile,)

    @property
    def needs_text(self) -> bool:
        """Whether the loss depends on any text-only row."""
        return self.gamma > 0 or self.lam > 0

    @property
    def needs_text_gradient(self) -> bool:
        """Whether the student's text-only rows receive gradient."""
        return self.lam > 0 or not (self.detach_prior or self.gamma == 0)
