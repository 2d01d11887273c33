"""A user's code, for the type checker alone (`make types`): what the public names return, and mistakes that it finds.

Each ``type: ignore`` is a mistake that must be found: mypy complains about one that hides nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import vgs
import vgs_kernels
from vgs import (
    PRESETS,
    ConfigError,
    Preset,
    PromptGroup,
    SelfDistillationConfig,
    SelfDistillationTrainer,
    VGSConfig,
    VGSGRPOConfig,
    VGSGRPOTrainer,
    VGSTrainer,
    anchor_group,
    answers_match,
    encode_groups,
    evaluate_accuracy,
    find_preset,
    fused_loss,
    load_samples,
    placeholder_ids,
    read_head,
    response_lengths,
    run_inside,
    score_groups,
    score_responses,
    score_with_anchor,
    token_weights,
    trajectory_ids,
    unwrap,
    vgs_step,
    whole_heads,
)
from vgs.data.sources import DataSource, Samples
from vgs_kernels import (
    Divergence,
    DivergenceOutput,
    FusedLinearDivergence,
    FusedLinearVGSLoss,
    PolicyTerm,
    TargetRow,
    VGSObjective,
    VGSOutput,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)


def losses(hidden: Tensor, weight: Tensor) -> None:
    """From hidden states and from logits."""
    objective = VGSObjective(gamma=2.0, lam=0.01, eta=0.41)
    output = fused_linear_vgs_loss(hidden, hidden, weight, hidden, hidden, weight, objective=objective)
    assert_type(output, VGSOutput)
    assert_type(output.loss, Tensor)
    assert_type(vgs_loss(hidden, hidden, hidden, hidden, objective=objective), VGSOutput)
    rows = [TargetRow(1.0, hidden, weight)]
    assert_type(fused_linear_divergence(hidden, weight, rows, divergence="jsd"), DivergenceOutput)
    assert_type(divergence_loss(hidden, [(1.0, hidden)]), DivergenceOutput)
    assert_type(Divergence("forward_kl").temperature, float)
    modules: list[nn.Module] = [FusedLinearVGSLoss(objective), FusedLinearDivergence()]
    policy = PolicyTerm(advantages=hidden[:, 0], weights=hidden[:, 0])
    fused_linear_vgs_loss(hidden, hidden, weight, hidden, hidden, weight, policy=policy)
    fused_linear_divergence(hidden, weight, rows, divergence=1)  # type: ignore[arg-type]
    VGSObjective(gama=2.0)  # type: ignore[call-arg]
    print(output.los)  # type: ignore[attr-defined]
    print(vgs_kernels.golf)  # type: ignore[attr-defined]
    del modules


def step(student: nn.Module, teacher: nn.Module, processor: Any, samples: list[dict[str, Any]]) -> Tensor:
    """One step, whole and by its parts."""
    output = vgs_step(student, teacher, processor, samples, [[[1, 2]]], "vgs")
    assert_type(output, VGSOutput | DivergenceOutput)
    assert_type(unwrap(student), nn.Module)
    groups = encode_groups(processor, samples, [[[1, 2]]], placeholder_ids(None))
    assert_type(groups, list[PromptGroup])
    assert_type(response_lengths(groups), list[int])
    assert_type(trajectory_ids(groups), Tensor)
    assert_type(score_groups(student, groups), tuple[Tensor, ...])
    rows, _ = score_with_anchor(student, groups, anchor_group(processor, [3]))
    with whole_heads(student, teacher):
        heads = read_head(student, torch.float32), read_head(teacher, torch.float32)
        assert_type(fused_loss(rows, rows, *heads, VGSObjective()), VGSOutput | DivergenceOutput)
    run_inside(student, lambda: (None, None))
    token_weights(response_lengths(groups), "trajectory", None)
    vgs_step(student, teacher, processor, samples, [[1, 2]])  # type: ignore[list-item]
    print(vgs.vgs_stp)  # type: ignore[attr-defined]
    return output.loss


def around(model: nn.Module, processor: Any) -> None:
    """Presets, data, evaluation, trainers."""
    assert_type(find_preset("opd"), Preset)
    assert_type(PRESETS["vgs"], Preset)
    samples = load_samples(DataSource(path="questions.jsonl"))
    assert_type(samples, Samples)
    assert_type(answers_match("three", "three"), bool)
    assert_type(evaluate_accuracy(model, processor, samples, answers_match), dict[str, float])
    assert_type(score_responses(model, model, processor, [samples[0]], [[1]], VGSObjective()), list[dict[str, Tensor]])
    settings = VGSConfig(output_dir="runs/my", gamma=2.0), SelfDistillationConfig(), VGSGRPOConfig()
    trainer = VGSTrainer(model=model, teacher_model=model, args=settings[0])
    assert_type(trainer.objective, VGSObjective)
    SelfDistillationTrainer(model=model, args=settings[1])
    VGSGRPOTrainer(model=model, teacher_model=model, args=settings[2])
    DataSource()  # type: ignore[call-arg]
    find_preset(3)  # type: ignore[arg-type]
    raise ConfigError("a sentence")
