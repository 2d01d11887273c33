"""Loss and gradient of a trainer's whole step against plain forwards of both models and the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import plain_rows
from torch import Tensor
from trainers import make_trainer

from vgs import VGSTrainer
from vgs.models.heads import read_head
from vgs.trainers.passes import backward

GAMMA, LAM, ETA = 1.5, 4.0, 0.7
RUNS = {
    "va_opd": {"num_generations": 2},
    "v_zero": {"num_generations": 2},
    "vcsd": {},
    "language_steering": {"gamma": GAMMA, "lam": LAM},
    "language_steering, split": {"gamma": GAMMA, "lam": LAM, "max_tokens_per_pass": 60},
}


def pixelated(image: Image.Image) -> Image.Image:
    small = image.resize([max(1, round(side / 10)) for side in image.size], Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.NEAREST)


def black(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.zeros_like(np.asarray(image)))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """[T] of log-probabilities [T, V]."""
    return (p.exp() * (p - q)).sum(-1)


class Response:
    """Log-probabilities [T, V] of one response, by plain forwards."""

    def __init__(self, trainer: VGSTrainer, sample: dict, ids: Tensor) -> None:
        self.trainer, self.sample, self.ids = trainer, sample, ids.tolist()

    def logits(self, teacher: bool, *, degrade=None, image: bool = True) -> Tensor:
        model = self.trainer.teacher_model if teacher else self.trainer.model
        sample = self.sample if degrade is None else {**self.sample, "images": [degrade(self.sample["images"][0])]}
        with torch.set_grad_enabled(not teacher):
            rows = plain_rows(model, self.trainer.processing_class, sample, self.ids, image)
            return (rows @ read_head(model, rows.dtype).weight.T).double()

    def logps(self, teacher: bool, **view) -> Tensor:
        return self.logits(teacher, **view).log_softmax(-1)

    def of_tokens(self, logps: Tensor) -> Tensor:
        return logps[range(len(self.ids)), self.ids]

    def contrast(self, degrade) -> Tensor:
        """[T] what the image adds to the teacher's log-probability of each token."""
        return self.of_tokens(self.logps(True)) - self.of_tokens(self.logps(True, degrade=degrade))


def standardised(values: Sequence[Tensor]) -> Tensor:
    column = torch.stack(list(values))
    return (column - column.mean()) / (column.std(correction=0) + 1e-6)


def va_opd(prompts: list[list[Response]]) -> Tensor:
    total = 0.0
    for responses in prompts:
        advantages, losses = [x.contrast(pixelated).clamp(min=0) for x in responses], []
        for x, advantage in zip(responses, advantages, strict=True):
            values, count = kl(x.logps(False), x.logps(True)), len(x.ids)
            top = set(sorted(range(count), key=lambda t: -advantage[t].item())[: math.ceil(0.2 * count)])
            rest = [t for t in range(count) if t not in top]
            halves = [values[list(top)].mean(), values[rest].mean()] if rest else [values.mean()]
            losses.append(sum(halves) / len(halves))
        weights = standardised([x.mean() for x in advantages]).softmax(0)
        total = total + (weights * torch.stack(losses)).sum()
    return total / len(prompts)


def v_zero(prompts: list[list[Response]]) -> Tensor:
    total, tokens = 0.0, sum(len(x.ids) for responses in prompts for x in responses)
    for responses in prompts:
        weights = (1 + standardised([x.contrast(black).mean() for x in responses])).clamp(0, 2)
        for weight, x in zip(weights, responses, strict=True):
            own = x.of_tokens(x.logps(False))
            ratio = (own - x.of_tokens(x.logps(True))).detach().clamp(-10, 10)
            total = total + weight * (ratio + ratio * (own - own.detach())).sum()
    return total / tokens


def vcsd(prompts: list[list[Response]]) -> Tensor:
    losses = []
    for (x,) in prompts:
        own, image = x.logps(False), x.logps(True)
        kept = image.exp() >= 0.1 * image.exp().amax(-1, keepdim=True)
        composed = 2 * x.logits(True) - x.logits(True, degrade=black)
        target = composed.masked_fill(~kept, -math.inf).log_softmax(-1)
        losses.append(4 * torch.where(kept, target.exp() * (target - own), 0.0).sum(-1).mean())
    return sum(losses) / len(losses)


def language_steering(prompts: list[list[Response]]) -> Tensor:
    """Prior and gate are constants; so is ``rest``, which makes it the divergence from one composed target."""
    every = [x for responses in prompts for x in responses]
    scores = [kl(x.logps(True), x.logps(True, image=False)) for x in every]
    limit, losses = torch.cat(scores).quantile(0.7), []
    for x, vds in zip(every, scores, strict=True):
        own, prior = x.logps(False), x.logps(False, image=False)
        image, blind = x.logps(True), x.logps(True, image=False)
        target = (prior.detach() + image - blind).log_softmax(-1)
        extra = LAM * (vds > limit)
        values = kl(own, image) + extra * kl(own, target) + GAMMA * kl(prior, blind)
        together = image + extra[:, None] / (1 + extra[:, None]) * (prior.detach() - blind)
        rest = (1 + extra) * together.logsumexp(-1)
        rest = rest - extra * (prior.detach() + image - blind).logsumexp(-1)
        losses.append((values + rest).mean())
    return sum(losses) / len(losses)


FORMULAS = {"va_opd": va_opd, "v_zero": v_zero, "vcsd": vcsd, "language_steering": language_steering}


@pytest.mark.parametrize("run", RUNS)
def test_loss_and_gradient_of_a_step(tmp_path: Path, run: str) -> None:
    name, options = run.split(",")[0], RUNS[run]
    each = options.get("num_generations", 1)
    trainer = make_trainer(tmp_path, preset=name, per_device_train_batch_size=8, eta=ETA, **options)
    trainer.model.train()
    samples = [sample for sample in trainer.train_dataset[: 8 // each] for _ in range(each)]
    batch = trainer.sample(samples)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.with_teacher(batch))
    backward(trainer.accelerator, loss)
    found = {key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None}
    prompts = [
        [Response(trainer, samples[number * each], ids) for ids in group.responses]
        for number, group in enumerate(batch["groups"])
    ]
    trainer.model.zero_grad()
    expected = ETA * FORMULAS[name](prompts)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for key, parameter in trainer.model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(gradient.abs().max().item(), 1e-3)
        ours = found.get(key, torch.zeros_like(gradient))
        torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-4 * scale, msg=f"{run}: {key}")
