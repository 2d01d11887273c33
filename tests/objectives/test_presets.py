"""Every preset against its paper's formula, written out on dense logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preset_cases import TOKENS, VOCABULARY, Case, kl, softmax
from torch import Tensor
from trainers import make_trainer

from vgs.objectives.presets import PRESETS, Preset
from vgs.objectives.weighting import EvidenceContrast, VisualAdvantage, weigh
from vgs.trainers.batching import split_batch
from vgs.trainers.passes import backward
from vgs_kernels import VGSObjective

ETA = 0.7
# Fewer entries than published, so that the support is a part of a small vocabulary.
SMALLER = {"visual_opsd": {"top_k": 6}, "vision_opd": {"top_k": 5}}


# ---- the papers' formulas: per-token losses [N] of a case


def rows_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p_I, p_x, q_I, q_x."""
    return tuple(softmax(case.logits(model, view)) for model in ("student", "teacher") for view in ("image", "text"))


def steered(case: Case) -> tuple[Tensor, Tensor]:
    """KL(p_I || q*), whose q* = p_x q_I / q_x is constant, and the gate of Eq. 16."""
    p, prior, q, blind = rows_of(case)
    product = prior.detach() * q / blind
    target = product / product.sum(-1, keepdim=True)
    vds = kl(q, blind)
    return kl(p, target), vds


def gkd(case: Case) -> Tensor:
    p, _, q, _ = rows_of(case)
    m = 0.5 * (p + q)
    return 0.5 * kl(q, m) + 0.5 * kl(p, m)


def opd(case: Case) -> Tensor:
    p, _, q, _ = rows_of(case)
    return kl(p, q)


def opsd(case: Case) -> Tensor:
    p, q = softmax(case.logits("student", "image")), softmax(case.logits("teacher", "privileged"))
    return torch.minimum(q * (q.log() - p.log()), torch.tensor(0.05, dtype=torch.float64)).sum(-1)


def visual_opsd(case: Case) -> Tensor:
    values = []
    for s, t in zip(case.logits("student", "image"), case.logits("teacher", "privileged"), strict=True):
        kept = t.topk(6).indices
        p, q = softmax(s[kept]), softmax(t[kept])
        m = 0.5 * p + 0.5 * q
        entries = 0.5 * q * (q / m).log() + 0.5 * p * (p / m).log()
        values.append(entries.clamp(max=0.05).sum())
    return torch.stack(values)


def vision_opd(case: Case) -> Tensor:
    values = []
    for s, t in zip(case.logits("student", "image"), case.logits("teacher", "privileged"), strict=True):
        p, q, kept = softmax(s), softmax(t), s.topk(5).indices
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[kept] = False
        p, q = (torch.cat([x[kept], x[rest].sum()[None]]) for x in (p, q))
        m = 0.5 * (p + q)
        values.append(0.5 * kl(p, m) + 0.5 * kl(q, m))
    return torch.stack(values)


def v_zero(case: Case) -> Tensor:
    p, q = (case.logits(model, "image").log_softmax(-1)[range(TOKENS), case.ids] for model in ("student", "teacher"))
    ratio = (p - q).detach().clamp(-10, 10)
    return ratio + ratio * (p - p.detach())


def vcsd(case: Case) -> Tensor:
    values = []
    for n in range(TOKENS):
        s, t, blank = (
            case.logits(*row)[n] for row in (("student", "image"), ("teacher", "image"), ("teacher", "control"))
        )
        q, control = softmax(t), softmax(blank)
        plausible = q >= 0.1 * q.max()
        target = q[plausible] * q[plausible] / control[plausible]
        target = target / target.sum()
        values.append(4 * (target * (target.log() - s.log_softmax(-1)[plausible])).sum())
    return torch.stack(values)


def vgs(case: Case) -> Tensor:
    p, prior, q, blind = rows_of(case)
    visual, vds = steered(case)
    gate = vds > torch.quantile(vds, 0.7)
    return kl(p, q) + 2 * visual + 0.3 * gate * kl(prior, blind)


def vgs_adaptive(case: Case) -> Tensor:
    p, prior, q, blind = rows_of(case)
    visual, vds = steered(case)
    low, high = torch.quantile(vds, 0.4), torch.quantile(vds, 0.7)
    gamma = torch.where(vds <= low, 0.0, torch.where(vds <= high, 1.0, 2.0))
    return kl(p, q) + gamma * visual + 0.3 * (vds > high) * kl(prior, blind)


def language_steering(case: Case) -> Tensor:
    p, prior, q, blind = rows_of(case)
    visual, vds = steered(case)
    return kl(p, q) + 2 * kl(prior, blind) + 0.3 * (vds > torch.quantile(vds, 0.7)) * visual


FORMULAS: dict[str, Callable[[Case], Tensor]] = {
    "gkd": gkd,
    "opd": opd,
    "opsd": opsd,
    "visual_opsd": visual_opsd,
    "vision_opd": vision_opd,
    "va_opd": opd,  # but for the weights
    "v_zero": v_zero,
    "vcsd": vcsd,
    "vgs": vgs,
    "vgs_adaptive": vgs_adaptive,
    "language_steering": language_steering,
}


def evaluate(preset: Preset, case: Case, **changes) -> Tensor:
    """The preset's loss of a case, given the rows that it asks for and no other."""
    objective = VGSObjective(lam=0.3, eta=ETA, schedule=preset.schedule or "constant")
    options = {"objective": objective, "token_weights": case.weights, "target_ids": case.ids, **changes}
    if preset.name == "language_steering":
        _, _, q, blind = rows_of(case)
        options["vds"] = kl(q, blind)
    student = {view: case.rows[view] for model, view in preset.rows if model == "student"}
    teacher = {view: case.teacher_rows[view] for model, view in preset.rows if model == "teacher"}
    return preset.loss(student, teacher, case.student, case.teacher, backend="torch", **options).loss


def test_every_preset_has_a_formula() -> None:
    assert set(FORMULAS) == set(PRESETS)


@pytest.mark.parametrize("kind", ["realistic", "peaked", "near"])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_the_papers(name: str, kind: str) -> None:
    case = Case(kind)
    preset = PRESETS[name].configured(1.0, **SMALLER.get(name, {}))
    loss, expected = evaluate(preset, case), ETA * (case.weights * FORMULAS[name](case)).sum()
    if name != "language_steering":  # there the two differ by a constant
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-12)
    ours, theirs = case.gradients(loss), case.gradients(expected)
    assert theirs["weight"].abs().max() > 0
    for part, gradient in theirs.items():
        scale = max(gradient.abs().max().item(), 1e-9)
        torch.testing.assert_close(ours[part], gradient, rtol=0, atol=1e-7 * scale, msg=f"{name}: {part}")


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_between_its_ends(beta: float) -> None:
    case = Case("realistic")
    p, _, q, _ = rows_of(case)
    m = beta * q + (1 - beta) * p
    values = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))
    loss = evaluate(PRESETS["gkd"].configured(1.0, beta=beta), case)
    torch.testing.assert_close(loss, ETA * (case.weights * values).sum())


def test_the_runs_temperature_divides_the_logits_where_the_paper_has_none_of_its_own() -> None:
    case = Case("realistic")
    p, q = (softmax(case.logits(model, "image") / 1.7) for model in ("student", "teacher"))
    loss = evaluate(PRESETS["opd"].configured(1.7), case)
    torch.testing.assert_close(loss, ETA * (case.weights * kl(p, q)).sum())


# ---- weights


def log_probabilities(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-3 * torch.rand(length, generator=generator) for length in lengths]


@pytest.mark.parametrize("lengths", [[7, 5, 1, 12], [3, 3], [1, 1, 1], [2, 0, 9]])
def test_visual_advantage_by_hand(lengths: list[int]) -> None:
    image, control = log_probabilities(lengths, 0), log_probabilities(lengths, 1)
    found = weigh(VisualAdvantage(temperature=0.5, balance=0.4), image, control)
    advantages = [
        [max(x - y, 0.0) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        for a, b in zip(image, control, strict=True)
    ]
    means = [sum(row) / len(row) for row in advantages if row]
    centre = sum(means) / len(means)
    spread = math.sqrt(sum((x - centre) ** 2 for x in means) / len(means))
    powers = [math.exp((x - centre) / (spread + 1e-6) / 0.5) for x in means]
    shares = iter([len(means) * x / sum(powers) for x in powers])
    for row, factors in zip(advantages, found, strict=True):
        if not row:
            assert factors.tolist() == []
            continue
        share, count = next(shares), math.ceil(0.2 * len(row))
        top = sorted(range(len(row)), key=lambda t: -row[t])[:count]
        for t, factor in enumerate(factors.tolist()):
            # A mean over the group, of a response whose tokens weigh 1 / length each.
            inside = 0.4 / count if t in top else 0.6 / max(len(row) - count, 1)
            expected = share * (1.0 if count == len(row) else inside * len(row))
            assert factor == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lengths", [[7, 5, 1, 12], [3, 3], [2, 0, 9]])
def test_evidence_contrast_by_hand(lengths: list[int]) -> None:
    image, control = log_probabilities(lengths, 2), log_probabilities(lengths, 3)
    found = weigh(EvidenceContrast(alpha=1.5), image, control)
    scores = [sum((a - b).tolist()) / len(a) if len(a) else None for a, b in zip(image, control, strict=True)]
    known = [x for x in scores if x is not None]
    centre = sum(known) / len(known)
    spread = math.sqrt(sum((x - centre) ** 2 for x in known) / len(known))
    weights = []
    for score, factors in zip(scores, found, strict=True):
        if score is None:
            assert factors.tolist() == []
            continue
        weight = min(max(1 + 1.5 * (score - centre) / (spread + 1e-6), 0.0), 2.0)
        weights.append(weight)
        assert factors.tolist() == pytest.approx([weight] * len(factors), rel=1e-4, abs=1e-5)
    assert len(set(weights)) > 1


def test_weights_are_neutral_where_all_responses_are_alike() -> None:
    image, control = [torch.full((10,), -1.0)] * 3, [torch.full((10,), -2.0)] * 3
    assert all(torch.allclose(x, torch.ones(10)) for x in EvidenceContrast()(image, control))
    factors = VisualAdvantage(balance=0.2, share=0.2)(image, control)
    assert all(torch.allclose(x, torch.ones(10)) for x in factors), "equal shares and equal advantages: the plain mean"


# ---- in the trainer

WEIGHED = {"va_opd": {"loss_reduction": "trajectory"}, "v_zero": {"loss_reduction": "token"}}


def weighed_batch(tmp_path: Path, name: str):
    """A trainer and a sampled batch of 4 prompts with 2 responses each."""
    options = {"num_generations": 2, "per_device_train_batch_size": 8, "eta": 1.0, **WEIGHED[name]}
    trainer = make_trainer(tmp_path, preset=name, **options)
    trainer.model.train()
    doubled = [sample for sample in trainer.train_dataset[:4] for _ in range(2)]
    return trainer, trainer.sample(doubled)


def gradient_of(trainer, parts: list[dict]) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    for part in parts:
        trainer.current_gradient_accumulation_steps = 1
        backward(trainer.accelerator, trainer.compute_loss(trainer.model, part))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", WEIGHED)
def test_a_prompts_weights_survive_any_split(tmp_path: Path, name: str) -> None:
    """Passes of a budget, and micro-batches that part the responses to one prompt."""
    trainer, batch = weighed_batch(tmp_path, name)
    scored = trainer.with_teacher(batch)
    factors = [entry.factors for entry in scored["teacher"]]
    assert all(set(entry.rows) == {"image"} for entry in scored["teacher"]), "what only weighs is not kept"
    assert any(not torch.allclose(x, torch.ones_like(x)) for x in factors)
    expected = gradient_of(trainer, [scored])
    split = split_batch(scored, 8, ("teacher",))
    trainer.args.max_tokens_per_pass = 40
    again = trainer.with_teacher(batch)
    passes = trainer.plan_passes(again, 1.0, trainer.objective, terms=False).passes
    assert len(passes) > 2
    for parts in ([again], split):
        for parameter, gradient in gradient_of(trainer, parts).items():
            scale = max(expected[parameter].abs().max().item(), 1e-3)
            torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-5 * scale, msg=parameter)


SEPARATE = [name for name, preset in PRESETS.items() if preset.teacher == "separate"]


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.slow
def test_each_preset_trains(tmp_path: Path, name: str) -> None:
    options = {"max_steps": 2, "eta": 0.5, "lam": 0.1, "max_tokens_per_pass": 500}
    if PRESETS[name].generations > 1:
        options["num_generations"] = 2
    trainer = make_trainer(tmp_path, preset=name, **options)
    before = {parameter: p.detach().clone() for parameter, p in trainer.model.named_parameters()}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(steps) == 2 and all(math.isfinite(entry["loss"]) for entry in steps)
    assert all(("divergence" in entry) == (not PRESETS[name].steered) for entry in steps)
    assert all(("language" in entry) == ("text" in PRESETS[name].views) for entry in steps)
    moved = [x for x, p in trainer.model.named_parameters() if not torch.equal(p, before[x])]
    assert any("visual" in x for x in moved) and any("embed_tokens" in x for x in moved)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
