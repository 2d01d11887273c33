"""The whole method for one batch, from prompts to the loss: what one swaps into a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vgs_kernels import DEFAULT_WORKSPACE_BYTES, DivergenceOutput, VGSObjective, VGSOutput

from .data.prompts import anchor_group, encode_groups
from .errors import ConfigError
from .models.families import placeholder_ids
from .models.forward import score_with_anchor
from .models.groups import response_ids, response_lengths, trajectory_ids
from .models.heads import read_head, visual_dependency, whole_heads
from .models.routers import check_routers
from .models.wrappers import run_inside, unwrap
from .objectives.definitions import Preset, shared_limits
from .objectives.presets import PRESETS, find_preset
from .objectives.weighting import token_weights

VIEWS = ("image", "text")
ROWS = {(model, view) for model in ("student", "teacher") for view in VIEWS}


def vgs_step(
    student: nn.Module,
    teacher: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    responses: Sequence[Sequence[Sequence[int]]],
    objective: VGSObjective | Preset | str = "vgs",
    *,
    reduction: str | None = None,
    num_items: Tensor | float | None = None,
    return_terms: bool = True,
    share_prefix: bool = True,
    kernel: str = "auto",
    vocab_size: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    gradient_tolerance: float = 0.0,
    backend: str = "auto",
    template_options: Mapping[str, Any] | None = None,
) -> VGSOutput | DivergenceOutput:
    """The loss of responses that the student has sampled (arXiv 2606.00564); call ``backward`` on its ``loss``.

    With the prompt's image (I) and without it (x), p the student, q the teacher, per token::

        loss = eta * (KL(p_I || q_I) + gamma * KL(p_I || q*) + lam * 1[KL(q_I || q_x) > Q] * KL(p_x || q_x))
        q*   = p_x q_I / q_x, normalised                                                      (Eq. 3-18)

    On R data-parallel ranks all must call, also one whose samples have no image or no token, or that has none. Wrappers
    average gradients over ranks, and accelerate divides a loss by its A accumulated calls: for the mean over all M
    responses with tokens (reduction "token": all tokens) of an optimizer step, pass ``num_items=M / (R * A)``.

    Args:
        student: a vision-language model (a text-only one, where texts are the evidence) as the loop holds it: bare,
            PEFT, prepared by accelerate, DDP, FSDP2 (``fully_shard``) or a DeepSpeed engine; in the mode (``train()``)
            and mixed precision it should run in.
        teacher: with the student's vocabulary and image tokens, held in any of these ways; in evaluation mode.
        processor: the student's; renders prompts and prepares images.
        samples: B dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images, may be empty). What the
            text-only view lacks are the images and all marked texts, see ``vgs.data.messages``.
        responses: of every sample G responses, each a list of token ids. Any G, and any length, 0 included.
        objective: ``VGSObjective(gamma, lam, eta, ...)``; or a preset, or its name, with images and text alone.
        reduction: ``"trajectory"``: mean over the tokens of each response, then over responses (the paper's);
            ``"token"``: over all tokens. None: as the preset says, else the paper's.
        num_items: a number or 0-d, what the sum is divided by; None: the responses with tokens (with "token": the
            tokens) of this call.
        return_terms: whether all per-token terms are wanted, also those that the loss alone does not need.
        share_prefix, kernel: of the packed forward, see ``vgs.models.forward.score_groups``.
        vocab_size, workspace_bytes, gradient_tolerance, backend: of the fused loss, see
            ``vgs_kernels.fused_linear_vgs_loss``.
        template_options: for the chat template, such as ``{"enable_thinking": False}``.

    Returns:
        Of N response tokens in the order sample, response, token: ``loss``, 0-d float32 with the graph through the
        student's wrapper, and detached [N] terms in nats: ``standard``, ``visual``, ``language``, ``vds``, ``gate``,
        ``entropy``, ``student_vds``. Presets that do not steer give a ``DivergenceOutput``.

    Raises:
        ConfigError: a preset that needs more than two views of a separate teacher; a student whose config asks for a
            loss of its router; a model that cannot be run in batches as its own forward would.
        ValueError, TypeError: naming the argument: an unknown name, responses that do not fit the samples or contain
            image tokens, heads of different devices or vocabularies.
    """
    preset, objective = resolve_objective(objective)
    p_model, q_model = unwrap(student), unwrap(teacher)
    check_routers("student", p_model.config)

    # Every prompt is encoded with its images and without them; its responses follow both.
    image_tokens, template = placeholder_ids(p_model.config), dict(template_options or {})
    groups = [x for x in encode_groups(processor, samples, responses, image_tokens, **template) if x.responses]
    trajectories, ids = trajectory_ids(groups), response_ids(groups) if preset.needs_ids else None
    reduction = reduction or preset.settings.get("loss_reduction", "trajectory")
    weights = token_weights(response_lengths(groups), reduction, num_items)
    # Ranks must run the same layers: where a batch has no image, a small one joins.
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    anchor = anchor_group(processor, image_tokens, **template) if distributed or not groups else None

    terms = return_terms and preset.has_terms
    with_vds = preset.needs_vds(objective, split=False)
    scoring = {"share_prefix": share_prefix, "kernel": kernel}
    options = {
        "vocab_size": vocab_size,
        "workspace_bytes": workspace_bytes,
        "gradient_tolerance": gradient_tolerance,
        "backend": backend,
    }

    def score_teacher() -> tuple[None, tuple[list[Tensor], Tensor | None]]:
        """Hidden states [N, Dt] of q_I and q_x and, where the loss must know it, KL(q_I || q_x) (Eq. 12)."""
        q, _ = score_with_anchor(q_model, groups, anchor, text=terms or preset.needs_text(objective), **scoring)
        if not with_vds:
            return None, (q, None)
        with whole_heads(q_model):
            head = read_head(q_model, q[0].dtype)
            return None, (q, visual_dependency(q, head, objective.temperature, **options))

    with torch.no_grad():
        _, (q, vds) = run_inside(teacher, score_teacher)
    steering = {}
    if with_vds:
        steering = {"vds": vds, "vds_threshold": shared_limits(vds, objective, trajectories.to(vds.device))[1]}

    def score_student() -> tuple[Tensor, VGSOutput | DivergenceOutput]:
        """Hidden states [N, Ds] of p_I and p_x, both heads, and the loss of them all."""
        gradient = preset.needs_text_gradient(objective)
        text = terms or preset.needs_own_text(objective)
        p, zero = score_with_anchor(p_model, groups, anchor, text=text, text_gradient=gradient, **scoring)
        with whole_heads(p_model, q_model):
            head, teacher_head = read_head(p_model, p[0].dtype), read_head(q_model, p[0].dtype)
            device = head.weight.device
            output = preset.loss(
                {view: x.to(device) for view, x in zip(VIEWS, p, strict=False)},
                {view: x.to(device) for view, x in zip(VIEWS, q, strict=False)},
                head,
                teacher_head,
                objective=objective,
                token_weights=torch.cat(weights).to(device) if weights else torch.zeros(0, device=device),
                target_ids=None if ids is None else ids.to(device),
                trajectory_ids=trajectories.to(device),
                return_terms=terms,
                **{name: x if x is None else x.to(device) for name, x in steering.items()},
                **options,
            )
        return output.loss if zero is None else output.loss + zero, output

    loss, output = run_inside(student, score_student)
    return replace(output, loss=loss)


def resolve_objective(objective: VGSObjective | Preset | str) -> tuple[Preset, VGSObjective]:
    """What is minimised, and its knobs (of a preset: those that it leaves open, as published).

    Args:
        objective: as of ``vgs_step``.

    Raises:
        ConfigError: an unknown name, or a preset that needs more than two views of a separate teacher.
    """
    if isinstance(objective, VGSObjective):
        return PRESETS["vgs"], objective
    preset = find_preset(objective, "objective") if isinstance(objective, str) else objective
    if preset.teacher != "separate":
        raise ConfigError(
            f"objective {preset.name!r} has a teacher of kind {preset.teacher!r}, the student's own weights, and "
            "vgs_step a separate one. Use vgs.SelfDistillationTrainer."
        )
    if missing := [f"{view} of the {model}" for model, view in sorted(preset.rows) if (model, view) not in ROWS]:
        raise ConfigError(
            f"objective {preset.name!r} needs the view {missing[0]}, and vgs_step has images and text alone. Use "
            "vgs.VGSTrainer."
        )
    knobs = VGSObjective(schedule=preset.schedule or "constant", temperature=preset.divergence.temperature)
    return preset, knobs
