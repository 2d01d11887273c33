"""Prompts encoded in the data loader's own processes, while the device computes the step before.

With ``dataloader_num_workers`` above 0 the loader's batches bring their prompts as the trainer samples and scores them;
with 0 they are encoded when they are asked. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.prompts import encode_groups
from ..errors import ConfigError
from ..models.groups import PromptGroup, placed

#: Entry of a sample that came encoded: its ``PromptGroup``, or the ``ConfigError`` that says why there is none.
ENCODED = "vgs_encoded_prompt"


@dataclass
class EncodeAhead:
    """Collates samples as they are, each with its prompt encoded: once for neighbours that are the same.

    Attributes:
        processor: the student's. forbidden: ids of its placeholders. options: of the chat template.
        last: what the batch before asked, and its encoded prompts. The hosts repeat a batch for every micro-batch.
    """

    processor: Any
    forbidden: Sequence[int]
    options: Mapping[str, Any]
    last: tuple[list[Any], list[Any]] = field(default=([], []), repr=False)

    def __call__(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples [B], each with the entry ``ENCODED``."""
        asked = [[sample.get(name) for name in ("prompt", "images", "image")] for sample in samples]
        if not _same(asked, self.last[0]):
            self.last = asked, self.encode(samples, asked)
        return [{**sample, ENCODED: found} for sample, found in zip(samples, self.last[1], strict=True)]

    def encode(self, samples: list[dict[str, Any]], asked: list[Any]) -> list[PromptGroup] | list[ConfigError]:
        """The prompt of each sample; the error in place of all where one cannot be encoded."""
        own, place = [], []
        for sample, what in zip(samples, asked, strict=True):
            if not own or not _same(what, asked[len(place) - 1]):
                own.append(sample)
            place.append(len(own) - 1)
        try:
            found = encode_groups(self.processor, own, [()] * len(own), self.forbidden, **self.options)
        except ConfigError as error:  # in its own words, which the loader would bury in a traceback
            return [error] * len(samples)
        return [found[index] for index in place]


def _same(asked: list[Any], other: list[Any]) -> bool:
    """Whether two lists of prompts and pictures are equal; of arrays and tensors only if they are the same objects."""
    try:
        return asked == other
    except (RuntimeError, ValueError):  # their comparison is no single answer
        return False


def encode_ahead(trainer: Any) -> None:
    """Let the data loader's processes, where there are any, encode a trainer's prompts.

    Args:
        trainer: with ``placeholder_ids``, before its loaders are made.
    """
    if trainer.args.dataloader_num_workers > 0:
        options = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        trainer.data_collator = EncodeAhead(trainer.processing_class, trainer.placeholder_ids, options)


def encoded_prompts(trainer: Any, samples: Sequence[Mapping[str, Any]]) -> list[PromptGroup]:
    """The prompts of samples without responses, encoded ahead or now; image fields on the trainer's device.

    Args:
        trainer: with ``processing_class``, ``placeholder_ids`` and ``accelerator``.
        samples: one per prompt.

    Raises:
        ConfigError: a sample that cannot be encoded.
    """
    device, ahead = trainer.accelerator.device, [sample.get(ENCODED) for sample in samples]
    if any(group is None for group in ahead):
        options = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        none = [()] * len(samples)
        return encode_groups(trainer.processing_class, samples, none, trainer.placeholder_ids, device=device, **options)
    for group in ahead:
        if isinstance(group, ConfigError):
            raise group
    return [replace(group, images=placed(group.images, device)) for group in ahead]
