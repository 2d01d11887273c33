"""verl's batch, a TensorDict, as the rows that are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from ...errors import ConfigError
from ..rows import host_row, with_token_types
from ..step import HostRows

#: Where the agent loop leaves the prompt without its images, and what verl calls the rows of one prompt.
TEXT_PROMPT = "text_prompt_ids"
PROMPT_NAME = "uid"


def _plain(value: Any) -> Any:
    """What a ``NonTensorData`` holds; anything else as it is."""
    return getattr(value, "data", value) if not isinstance(value, Tensor) else value


def _column(batch: TensorDict, name: str) -> list[Any] | None:
    """The values of a column, one for each row; None where there is no such column."""
    if name not in batch.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
        return None
    column = batch[name]
    return [_plain(value) for value in (column.unbind() if isinstance(column, Tensor) else column)]


def _text_prompts(batch: TensorDict, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Of every row the prompt without its images; a row without images has one prompt."""
    rows = _column(batch, "extra_fields")  # trainer.use_v1
    if rows is not None:
        found = [row.get(TEXT_PROMPT) if isinstance(row, Mapping) else None for row in rows]
    else:
        found = _column(batch, TEXT_PROMPT) or [None] * len(prompts)
    images = _column(batch, "multi_modal_inputs") or [None] * len(prompts)
    texts = []
    for number, (text, prompt, fields) in enumerate(zip(found, prompts, images, strict=True)):
        if text is None and fields:
            raise ConfigError(
                f"row {number} has images, but no {TEXT_PROMPT}: set rollout.agent.default_agent_loop=vgs_single_turn, "
                f"or let your own agent loop put them into extra_fields (vgs.integrations.verl.agent_loop)."
            )
        texts.append(prompt if text is None else torch.as_tensor(text, dtype=torch.int64))
    return texts


def read_rows(batch: TensorDict, model: nn.Module, placeholders: Sequence[int]) -> HostRows:
    """The rows of a batch of verl's actor.

    Args:
        batch: B rows; ``input_ids`` (nested, prompt and response), ``response_mask`` (nested, 1 where the student
            sampled the token), and ``multi_modal_inputs``, ``extra_fields`` and ``uid`` where there are such.
        model: the student, unwrapped.
        placeholders: ids of its image and video tokens.

    Raises:
        ConfigError: a row with images and without its text-only prompt; see ``host_row``.
    """
    masks = [mask.bool().cpu() for mask in batch["response_mask"].unbind()]
    ids = [row.cpu() for row in batch["input_ids"].unbind()]
    cuts = [len(row) - len(mask) for row, mask in zip(ids, masks, strict=True)]
    prompts = [row[:cut] for row, cut in zip(ids, cuts, strict=True)]
    texts = _text_prompts(batch, prompts)
    fields = _column(batch, "multi_modal_inputs") or [None] * len(ids)
    names = _column(batch, PROMPT_NAME) or range(len(ids))
    rows = []
    for number, (row, cut) in enumerate(zip(ids, cuts, strict=True)):
        parts = {key: value for key, value in (fields[number] or {}).items() if value is not None}
        group = host_row(row[:cut], texts[number], row[cut:], parts, placeholders, name=f"row {number}")
        rows.append(with_token_types(model, group))
    return HostRows(rows, masks, list(names))
