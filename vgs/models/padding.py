"""A view as one padded batch: how a family runs whose packed rows are not exact.

Padding stands on the right, behind the response: then every token has the place that it has in a sequence alone, and
nothing that a model carries from token to token has met padding before it. (``generate`` needs it on the left.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import PER_TOKEN_FIELDS, PromptGroup
from .image_fields import is_pixels, join_images
from .shared_images import SharedImages


class PaddedView(NamedTuple):
    """B responses behind their prompts in one view, one row each, padded on the right.

    Attributes:
        input_ids, attention_mask: [B, L] int64.
        scored: [B, L] bool, the tokens whose hidden states predict the response tokens.
        images: the image fields, of the multimodal view alone; per-token ones of both (text-only: zeros).
        shared: where the pixels in ``images`` are those of each prompt once: of which prompts, for how many rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    images: dict[str, Tensor]
    shared: SharedImages | None = None


def pad_prompts(groups: Sequence[PromptGroup], pad_token_id: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts with their images as one batch, for ``generate``.

    Args:
        groups: prompts; their responses are not looked at.
        pad_token_id: fills padding columns.

    Returns:
        ids and mask, [B, P] int64 padded on the left, and the multimodal fields (per-token ones [B, P]).
    """
    width = max(len(group.prompt_ids) for group in groups)

    def rows(values: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([pad(value, (width - len(value), 0), value=fill) for value in values])

    ids = [group.prompt_ids for group in groups]
    fields = join_images([group.images for group in groups])
    fields |= {name: rows(values, 0) for name, values in token_fields(groups).items()}
    return rows(ids, pad_token_id), rows([torch.ones_like(x) for x in ids], 0), fields


def token_fields(groups: Sequence[PromptGroup]) -> dict[str, list[Tensor]]:
    """The per-token fields [P] of each prompt on the CPU; zeros for a prompt that lacks what others have."""
    return {
        name: [group.images.get(name, torch.zeros_like(group.prompt_ids)).cpu() for group in groups]
        for name in PER_TOKEN_FIELDS
        if any(name in group.images for group in groups)
    }


def pad_groups(
    groups: Sequence[PromptGroup],
    view: str,
    device: torch.device | str,
    pad_token_id: int = 0,
    *,
    share_images: bool = False,
) -> PaddedView:
    """One row for every response of every group; images are repeated with their prompts.

    Args:
        groups: prompts with their responses.
        view: ``"multimodal"`` or ``"text"``.
        device: where the tensors go.
        pad_token_id: fills padding columns.
        share_images: whether pixels are those of each prompt once, for ``vgs.models.shared_images``.
    """
    singles, with_images = [single for group in groups for single in group.alone()], view == "multimodal"
    prompts = [x.prompt_ids if with_images else x.text_prompt_ids for x in singles]
    tails = [x.responses[0] for x in singles]
    width = max(len(x) + len(tail) for x, tail in zip(prompts, tails, strict=True))

    def rows(values: Sequence[Tensor], behind: Sequence[Tensor], fill: int) -> Tensor:
        lined = [torch.cat(parts) for parts in zip(values, behind, strict=True)]
        return torch.stack([pad(x, (0, width - len(x)), value=fill) for x in lined]).to(device)

    mask = rows([torch.ones_like(x) for x in prompts], [torch.ones_like(x) for x in tails], 0)
    scored = rows([torch.zeros_like(x[1:]) for x in prompts], [torch.ones_like(x) for x in tails], 0).bool()
    fields = [x.images if with_images else {} for x in singles]
    shared = _shared_images(groups, device) if share_images and with_images else None
    images = {name: value.to(device) for name, value in join_images(fields, pixels=shared is None).items()}
    if shared:
        images |= {name: value for name, value in shared.fields.items() if is_pixels(name)}
    for name, kinds in token_fields(singles).items():
        if not with_images:  # zeros: some models want them of every batch in training
            kinds = [torch.zeros_like(x) for x in prompts]
        images[name] = rows(kinds, [torch.zeros_like(x) for x in tails], 0)
    return PaddedView(rows(prompts, tails, pad_token_id), mask, scored, images, shared)


def _shared_images(groups: Sequence[PromptGroup], device: torch.device | str) -> SharedImages | None:
    """The images of prompts that have responses; None if there are none."""
    asked = [group for group in groups if group.has_images and group.responses]
    if not asked:
        return None
    fields = {name: value.to(device) for name, value in join_images([group.images for group in asked]).items()}
    return SharedImages(tuple(x.prompt_ids for x in asked), tuple(len(x.responses) for x in asked), fields)
