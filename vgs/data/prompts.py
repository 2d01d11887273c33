"""From prompts, images and responses to the two views every token is scored in: with the evidence, and without it.

Every prompt is encoded alone, unpadded, by its model's own processor, and these encodings are the only ones used: in
sampling, in scoring and in evaluation. What a processor says to a batch differs from family to family: some pad by
default, some return lists of tensors of different shapes.

The text-only view is the same conversation rendered again *without* its evidence: its image items, and the text parts
that are marked (``vgs.data.messages``). Cutting the image span out of the token ids instead can tokenise differently
where text touches the span, and keeping the placeholders without pixels runs silently and changes every hidden state.
A conversation without any evidence has two equal views, and a visual dependency of 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, in_one_line
from ..models.groups import PER_TOKEN_FIELDS, PromptGroup, placed
from ..models.image_fields import IMAGE_FIELDS
from ..models.padding import pad_prompts
from ..models.tokenizers import media_tokens, tokenizer_of
from .messages import (
    Messages,
    fill_images,
    has_evidence,
    prompt_images,
    prompt_texts,
    remove_evidence,
    shared_format,
    unmarked,
)

ANCHOR_SIDE = 64  # pixels: a few tokens in every family
#: What some processors return for their own use; no model's forward takes it.
UNUSED_FIELDS = frozenset({"input_ids", "attention_mask", "labels", "num_crops", "num_patches", "rows", "cols"})


def placeholder_texts(processor: Any, forbidden: Sequence[int]) -> list[str]:
    """The tokens that processor or model read as the place of a picture, video or sound; no ordinary words.

    Args:
        processor: a processor or a tokenizer.
        forbidden: placeholder ids of the model, see ``vgs.models.families.placeholder_ids``.
    """
    added = tokenizer_of(processor).get_added_vocab()
    return sorted({*media_tokens(processor), *(token for token, index in added.items() if index in set(forbidden))})


def _check_texts(messages: Messages | str, marks: Sequence[str]) -> None:
    if found := [mark for mark in marks if any(mark in text for text in prompt_texts(messages))]:
        raise ValueError(
            f"the prompt has the image placeholder {', '.join(found)} in its text; put images in the sample's "
            "`images`, and no placeholder in the prompt's text."
        )


@contextmanager
def _named(index: int) -> Iterator[None]:
    """What is raised inside names the sample."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"sample {index}: {in_one_line(error)}") from error


def _as_tensor(value: Any) -> Tensor:
    """Tensors, arrays, numbers, and lists of them, however deep; tensors of one shape are stacked."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple, Tensor, np.ndarray)):
        return torch.stack([_as_tensor(part) for part in value])
    return torch.as_tensor(np.asarray(value))


def encode_prompt(
    processor: Any, messages: Messages | str, **template_options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """One prompt as its model takes it.

    Args:
        processor: the model's processor; of a text-only model its tokenizer.
        messages: chat messages of content blocks with their images (``fill_images``), or a plain text, to which no
            template is applied.
        **template_options: passed to ``apply_chat_template``.

    Returns:
        [P] int64 token ids, unpadded, and the multimodal fields as the family's forward takes them (per-token ones
        [P]).

    Raises:
        ValueError: the processor returns a field that cannot be joined over prompts.
    """
    options: dict[str, Any] = {"return_tensors": "pt"}
    if isinstance(messages, str):
        encoded = processor(text=[messages], padding=False, **options)
    else:
        if hasattr(processor, "tokenizer"):
            options["processor_kwargs"] = {"padding": False}  # some processors pad unless they are told not to
        else:
            options["padding"] = False
            messages = [
                {**x, "content": "".join(prompt_texts([x]))} if x.get("content") is not None else x for x in messages
            ]
        encoded = processor.apply_chat_template(
            unmarked(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **options,
            **template_options,
        )
    ids = _as_tensor(encoded["input_ids"])
    fields = {}
    for name, value in encoded.items():
        if name in UNUSED_FIELDS or value is None:
            continue
        if name not in PER_TOKEN_FIELDS and name not in IMAGE_FIELDS:
            raise ValueError(
                f"{type(processor).__name__} returns the field {name!r}, for which there is no rule how prompts are "
                "joined: this family is not supported."
            )
        fields[name] = _as_tensor(value)
    if ids.ndim == 2:
        ids = ids[0]
        fields = {name: value[0] if name in PER_TOKEN_FIELDS else value for name, value in fields.items()}
    return ids, fields


def unexpanded_ids(processor: Any, messages: Messages | str, **template_options: Any) -> list[int]:
    """Token ids of one prompt as its chat template writes it: each image is one mark, not yet as many as it has tokens.

    Args:
        processor, messages, template_options: as in ``encode_prompt``.
    """
    tokenizer = tokenizer_of(processor)
    if isinstance(messages, str):
        return tokenizer(messages)["input_ids"]
    text = processor.apply_chat_template(
        unmarked(messages), add_generation_prompt=True, tokenize=False, **template_options
    )
    # As the processor: no second beginning-of-sequence token where the template writes one.
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun)["input_ids"]


def _text_only(
    processor: Any, messages: Messages | str, forbidden: Sequence[int], marks: Sequence[str], **template_options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """``encode_prompt`` of the prompt without its evidence, and no placeholder in it."""
    _check_texts(messages, marks)
    try:
        ids, fields = encode_prompt(processor, remove_evidence(messages), **template_options)
    except Exception as error:
        if not prompt_images(messages):
            raise
        raise ValueError(
            f"{type(processor).__name__} takes no prompt without its images ({in_one_line(error)}): its family has no "
            "text-only view, and cannot be steered by what images change."
        ) from error
    if found := set(ids.tolist()) & set(forbidden):  # the chat template's own
        names = tokenizer_of(processor).convert_ids_to_tokens(sorted(found))
        raise ValueError(
            f"the text-only view still contains the image placeholder {', '.join(names)}, which the chat template "
            "writes without any image."
        )
    return ids, fields


def encode_prompts(
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    forbidden: Sequence[int] = (),
    *,
    first: int = 0,
    **template_options: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts with their images as one batch, for ``generate``.

    Args:
        processor, template_options: as in ``encode_prompt``.
        samples: dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images, may be empty).
        forbidden: placeholder ids (``placeholder_ids``) that no text may contain, beside the processor's own.
        first: the number of the first sample, for errors.

    Returns:
        ids and mask, [B, P] int64 padded on the left, and the multimodal fields (per-token ones [B, P]).

    Raises:
        ConfigError: a sample that cannot be encoded; its number is named.
    """
    marks, groups = placeholder_texts(processor, forbidden), []
    for index, given in enumerate(samples, start=first):
        with _named(index):
            sample = shared_format(given)
            _check_texts(sample["prompt"], marks)
            filled = fill_images(sample["prompt"], sample["images"])
            ids, fields = encode_prompt(processor, filled, **template_options)
        groups.append(PromptGroup(ids, ids[:0], (), fields))
    return pad_prompts(groups, tokenizer_of(processor).pad_token_id or 0)


def encode_groups(
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    responses: Sequence[Sequence[Sequence[int]]],
    forbidden: Sequence[int],
    device: torch.device | str = "cpu",
    **template_options: Any,
) -> list[PromptGroup]:
    """Both views of samples in the shared format (``prompt``, ``images``) with given responses.

    Args:
        processor, template_options: as in ``encode_prompt``.
        samples: dicts with ``prompt`` and ``images`` (or TRL's ``image``).
        responses: for every sample its responses, each a list of token ids.
        forbidden: placeholder ids, see ``placeholder_ids``.
        device: where the image fields go.

    Returns:
        One group per sample; its tensors are on the CPU, but for the image fields.

    Raises:
        TypeError: responses that are no lists of token ids.
        ConfigError: a sample that cannot be encoded, its number is named: an image placeholder in its text, another
            number of images than places, a picture that the processor refuses.
        ValueError: different numbers of samples and responses, or an image placeholder in a response.
    """
    if len(samples) != len(responses):
        raise ValueError(f"responses holds entries for {len(responses)} samples, expected {len(samples)}.")
    _check_responses(responses, forbidden)
    marks, groups = placeholder_texts(processor, forbidden), []
    for index, (given, answers) in enumerate(zip(samples, responses, strict=True)):
        with _named(index):
            sample = shared_format(given)
            filled = fill_images(sample["prompt"], sample["images"])
            text_ids, fields = _text_only(processor, filled, forbidden, marks, **template_options)
            ids = text_ids
            if has_evidence(filled):
                ids, fields = encode_prompt(processor, filled, **template_options)
        tensors = tuple(torch.tensor(list(part), dtype=torch.int64) for part in answers)
        groups.append(PromptGroup(ids, text_ids, tensors, placed(fields, device)))
    return groups


def _check_responses(responses: Sequence[Any], forbidden: Sequence[int]) -> None:
    for index, answers in enumerate(responses):
        for number, ids in enumerate(answers):
            if not hasattr(ids, "__len__"):
                raise TypeError(
                    f"responses[{index}] must be a list of responses, each a list of token ids, got {ids!r} in it."
                )
            if found := {int(token) for token in ids} & set(forbidden):
                raise ValueError(
                    f"responses[{index}][{number}] contains the image or video token {min(found)}, which stands for "
                    "pixels. Forbid it in sampling (suppress_tokens, bad_words or logit_bias)."
                )


def check_text_view(processor: Any, forbidden: Sequence[int], **template_options: Any) -> None:
    """Stop where a family has no text-only view, or its images have fields without a rule how prompts are joined.

    Args:
        processor, forbidden, template_options: as of ``encode_groups``; a tokenizer passes.

    Raises:
        ConfigError: such a family.
    """
    if not hasattr(processor, "tokenizer"):
        return
    image = Image.new("RGB", (ANCHOR_SIDE, ANCHOR_SIDE))
    messages = fill_images([{"role": "user", "content": "."}], [image])
    try:
        encode_prompt(processor, messages, **template_options)
        _text_only(processor, messages, forbidden, placeholder_texts(processor, forbidden), **template_options)
    except Exception as error:
        raise ConfigError(in_one_line(error)) from error


def anchor_group(
    processor: Any, forbidden: Sequence[int], device: torch.device | str = "cpu", **template_options: Any
) -> PromptGroup:
    """A prompt with a small image and one token to it, for ``vgs.models.forward.score_with_anchor``; of a text-only
    model without an image.

    Args:
        processor, forbidden, device, template_options: as of ``encode_groups``.

    Raises:
        ValueError: a chat template that puts an image placeholder into a text-only prompt.
    """
    images = [Image.new("RGB", (ANCHOR_SIDE, ANCHOR_SIDE))] if hasattr(processor, "tokenizer") else []
    sample = {"prompt": [{"role": "user", "content": "."}], "images": images}
    response = [[tokenizer_of(processor).eos_token_id]]
    return encode_groups(processor, [sample], [response], forbidden, device, **template_options)[0]
