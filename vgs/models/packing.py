"""Several prompts with their responses, in one or both views, as one row without padding.

    [ prompt 1 | response 1a | response 1b | prompt 2 | response 2a | ... ]

A prompt's responses follow it and share it: each attends to the prompt and to itself, at the positions that it would
have right behind the prompt. So the image and the prompt are computed once, and gradients through them add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention import KERNELS, RowLayout
from .groups import PER_TOKEN_FIELDS, PromptGroup
from .image_fields import join_images


@dataclass(frozen=True)
class Stem:
    """One prompt in one view, with the responses that are to be scored behind it.

    Attributes:
        ids: [P] int64.
        positions: [R, P] rotary positions, on R axes; see ``vgs.models.positions.prompt_positions``.
        responses: tensors [T_g] int64.
        images: as in ``PromptGroup``; empty in the text-only view.
    """

    ids: Tensor
    positions: Tensor
    responses: tuple[Tensor, ...]
    images: dict[str, Tensor]

    def alone(self) -> list[Stem]:
        """One stem for each response."""
        return [replace(self, responses=(response,)) for response in self.responses]


@dataclass(frozen=True)
class PackedRow:
    """A batch of one row, T tokens, for a multimodal backbone.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T], or [1 + R, 1, T] where tokens have positions on R > 1 axes, behind their place in the
            sequence: all such decoders take this form.
        layout: who attends to whom.
        scored: [N] int64, the token whose hidden state predicts each response token; order: stem, response, token.
        images: the image fields of the whole row; per-token ones are [1, T].
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: RowLayout
    scored: Tensor
    images: dict[str, Tensor]


def image_stem(group: PromptGroup, positions: Tensor) -> Stem:
    """A prompt with its images, at these positions [R, P]."""
    return Stem(group.prompt_ids, positions, group.responses, group.images)


def text_stem(group: PromptGroup, axes: int) -> Stem:
    """A prompt without its images, whose positions just count, on every axis."""
    count = torch.arange(len(group.text_prompt_ids))
    return Stem(group.text_prompt_ids, count.expand(axes, -1), group.responses, {})


def pack(
    stems: Sequence[Stem], device: torch.device | str, *, share_prefix: bool = True, kernel: str = "auto"
) -> PackedRow:
    """Lay out stems one behind the other.

    Args:
        stems: at least one.
        device: where the row's tensors go.
        share_prefix: with False every response gets a copy of its prompt.
        kernel: see ``RowLayout``.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
    if not share_prefix:
        stems = [single for stem in stems for single in stem.alone()]
    names = [name for name in PER_TOKEN_FIELDS if any(name in stem.images for stem in stems)]
    kinds: dict[str, list[Tensor]] = {name: [] for name in names}
    ids, positions, places, prompts, branches, homes, lengths = [], [], [], [], [], [], []
    scored, starts = [torch.zeros(0, dtype=torch.int64)], [0]
    for index, stem in enumerate(stems):
        start, prompt = starts[-1], len(stem.ids)
        cursor = start + prompt
        ids.append(stem.ids)
        positions.append(stem.positions)
        places.append(torch.arange(prompt))
        branches.append(torch.zeros(prompt, dtype=torch.int32))
        homes.append(torch.arange(start, cursor))
        for number, response in enumerate(stem.responses, start=1):
            inputs = response[:-1]  # the last token predicts nothing that is scored
            count = torch.arange(len(inputs))
            ids.append(inputs)
            positions.append((stem.positions.max() + 1 + count).expand(len(stem.positions), -1))
            places.append(prompt + count)
            branches.append(torch.full_like(inputs, number, dtype=torch.int32))
            homes.append(start + prompt + count)
            if len(response):
                scored += [torch.tensor([start + prompt - 1]), cursor + count]
            cursor += len(inputs)
        starts.append(cursor)
        lengths.append((prompt, *[max(len(response) - 1, 0) for response in stem.responses]))
        prompts.append(torch.full((cursor - start,), index, dtype=torch.int32))
        for name in names:
            kind = stem.images.get(name)
            kind = torch.zeros(prompt, dtype=torch.int64) if kind is None else kind.cpu()
            kinds[name].append(pad(kind, (0, cursor - start - prompt)))

    def placed(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=-1).to(device, non_blocking=True)

    axes = placed(positions)
    if len(axes) > 1:
        axes = torch.cat([placed(places)[None], axes])[:, None]
    shared = any(len(stem.responses) > 1 for stem in stems)
    layout = RowLayout(placed(prompts), placed(branches), placed(homes), tuple(starts), tuple(lengths), shared, kernel)
    images = {name: x.to(device) for name, x in join_images([stem.images for stem in stems]).items()}
    images |= {name: placed(parts)[None] for name, parts in kinds.items()}
    return PackedRow(placed(ids)[None], axes, layout, placed(scored), images)
