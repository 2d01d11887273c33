"""How many tokens a prompt has, and which prompts are too long."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from datasets.fingerprint import Hasher

from ..errors import ConfigError
from .cache import processor_fingerprint, remembered
from .checks import data_fingerprint, over_rows
from .conversations import BadRow
from .messages import fill_images, shared_format
from .prompts import encode_prompt
from .sources import Samples, listed

logger = logging.getLogger(__name__)

PROBES = 4  # rows of each number of images on which the count from sizes is compared with full encoding


def prompt_length(processor: Any, sample: Mapping[str, Any], **template_options: Any) -> int:
    """Tokens of a sample's prompt, image tokens included: it is encoded alone, as for sampling and scoring."""
    sample = shared_format(sample)
    return len(encode_prompt(processor, fill_images(sample["prompt"], sample["images"]), **template_options)[0])


def _count_from_sizes(processor: Any, sample: Mapping[str, Any], **template_options: Any) -> int:
    """Tokens of the rendered text, and those that the processor counts for (width, height) of each image.

    It differs from the prompt's length by a number that depends on how many images there are: the placeholders in the
    text, and what a processor writes around its image tokens.
    """
    sizes = sample["images"]
    messages = fill_images(sample["prompt"], list(range(len(sizes))))
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_options)
    count = len(processor.tokenizer(text)["input_ids"])
    if sizes:
        data = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
        count += sum(data.num_image_tokens)
    return count


def _named(samples: Samples, function: Callable[[int], Any]) -> Callable[[int], Any]:
    """The function of an index, whose errors name the row."""

    def named(index: int) -> Any:
        try:
            return function(index)
        except BadRow as error:
            raise ConfigError(samples.describe(index, str(error).rstrip("."))) from error
        except Exception as error:
            raise ConfigError(
                samples.describe(index, f"cannot be encoded: {' '.join(str(error).split())}".rstrip("."))
            ) from error

    return named


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """First, last and others between, evenly."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def _counted_lengths(samples: Samples, processor: Any, **template_options: Any) -> list[int] | None:
    """Lengths without a pixel being decoded, except those of a few rows; None where the processor's count is not exact.

    For each number of images, the difference between count and full encoding is measured on ``PROBES`` rows from the
    smallest to the largest count. It must be the same on all of them.
    """

    def count(index: int) -> tuple[int, int]:
        sample = samples.measured(index)
        with lock:
            return _count_from_sizes(processor, sample, **template_options), len(sample["images"])

    lock = Lock()
    counts = over_rows(_named(samples, count), len(samples), "prompt lengths")
    groups: dict[int, list[int]] = defaultdict(list)
    for index, (_, images) in enumerate(counts):
        groups[images].append(index)
    lengths = [0] * len(samples)
    for images, members in groups.items():
        members.sort(key=lambda index: counts[index][0])
        probes = _spread(members, PROBES)
        offsets = {prompt_length(processor, samples[i], **template_options) - counts[i][0] for i in probes}
        if len(offsets) != 1:
            logger.info(
                "%s counts image tokens (%d images) inexactly: prompts are encoded.", type(processor).__name__, images
            )
            return None
        (offset,) = offsets
        for index in members:
            lengths[index] = counts[index][0] + offset
    return lengths


def prompt_lengths(samples: Samples, processor: Any, **template_options: Any) -> list[int]:
    """Tokens of every prompt, kept on disk for these data and this processor.

    Where the processor counts image tokens from sizes (``_get_num_multimodal_tokens``) and its count proves exact, only
    the headers of pictures are read; else every prompt is encoded.

    Raises:
        ConfigError: a row that cannot be read or that the processor refuses; its number is named.
    """

    def encoded(index: int) -> int:
        sample = samples.decoded(index)
        with lock:  # a tokenizer is no place for two threads: its padding is a setting of all
            return prompt_length(processor, sample, **template_options)

    lock = Lock()

    def compute() -> list[int]:
        lengths = None
        if hasattr(processor, "_get_num_multimodal_tokens"):
            lengths = _counted_lengths(samples, processor, **template_options)
        return lengths or over_rows(_named(samples, encoded), len(samples), "prompt lengths")

    key = Hasher.hash([data_fingerprint(samples), processor_fingerprint(processor, **template_options)])
    return remembered("lengths", key, compute)


def drop_long_prompts(samples: Samples, processor: Any, limit: int, **template_options: Any) -> Samples:
    """Samples whose prompt has at most ``limit`` tokens; how many are dropped, and which, is logged.

    Raises:
        ConfigError: none is left, or a row cannot be read.
    """
    return keep_short_prompts(samples, prompt_lengths(samples, processor, **template_options), limit)


def keep_short_prompts(samples: Samples, lengths: Sequence[int], limit: int) -> Samples:
    """As ``drop_long_prompts``, of prompts whose ``lengths`` are known."""
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    dropped = [samples.indices[i] for i, length in enumerate(lengths) if length > limit]
    if dropped:
        logger.warning(
            "%d of %d prompts are longer than %d tokens: dropped (rows %s)",
            *(len(dropped), len(samples), limit, listed(dropped)),
        )
    if not kept:
        raise ConfigError(f"No prompt of {samples.source.path} has at most max_prompt_length={limit} tokens.")
    return samples.select(kept)
