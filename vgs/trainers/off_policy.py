"""Batches of which a part has recorded responses instead of the student's own.

Which prompts those are depends on the run's seed, the step and the process alone, so a resumed run has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..data.prompts import encode_groups
from ..data.recorded import SHOWN, bad_recordings, end_of_turn, recorded_ids
from ..errors import ConfigError
from ..models.groups import PromptGroup
from ..models.tokenizers import tokenizer_of
from ..teachers.cache import StateCache
from ..teachers.fingerprints import prompt_fingerprint
from ..teachers.sources import TeacherSource
from .rollouts import check_prompt_lengths, rollout
from .routes import column_values


def on_policy(fraction: float, prompts: int, step: int, seed: int, process: int) -> list[bool]:
    """Which prompts of a process's batch the student answers.

    Over the steps their share is the fraction, as exactly as whole numbers can have it; every process has as many.

    Args:
        fraction: in [0, 1].
        prompts: of the batch on one process.
        step: optimizer steps done before.
        seed: of the run.
        process: its number.
    """
    rate = Fraction(str(fraction)) * prompts
    count = math.floor(rate * (step + 1)) - math.floor(rate * step)
    order = np.random.default_rng([seed, step, process]).permutation(prompts)
    chosen = set(order[:count].tolist())
    return [index in chosen for index in range(prompts)]


class Recorded:
    """The recorded responses of a run.

    Args:
        trainer: with ``HostHooks``, ``opened`` teachers and ``placeholder_ids``.

    Raises:
        ConfigError: rows without (usable) responses, or a cache and an ``on_policy_fraction`` that do not fit.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        args, opened = trainer.args, trainer.opened
        self._caches = {name: found.cache for name, found in opened.items() if found.cache is not None}
        self._end = end_of_turn(trainer.processing_class, **trainer.chat_template_kwargs)
        values = column_values(trainer.train_dataset, "responses")
        if values is None and (bare := [found.what for name, found in opened.items() if name not in self._caches]):
            raise ConfigError(
                f"on_policy_fraction={args.on_policy_fraction} needs recorded responses: a column 'responses' in "
                f"train_dataset (data.train.responses), or a cache of {bare[0]}."
            )
        if values is not None:
            rows = min(found.facts.head_rows for found in opened.values())
            options = {"forbidden": trainer.placeholder_ids, "vocabulary": rows, **trainer.chat_template_kwargs}
            given = trainer.train_dataset, "train_dataset", values, trainer.processing_class, args
            check_recorded(*given, **options)

    def rollout(self, inputs: list[dict[str, Any]], count: int) -> list[PromptGroup]:
        """Prompts with responses, sampled and recorded ones. Collective where the student's own sampling is.

        Args:
            inputs: samples, one per response; those to one prompt follow each other.
            count: responses to each prompt.
        """
        trainer, args = self._trainer, self._trainer.args
        prompts = [inputs[first : first + count] for first in range(0, len(inputs), count)]
        place = trainer.state.global_step, args.seed, args.process_index
        own = on_policy(args.on_policy_fraction, len(prompts), *place)
        asked = [x for samples, keep in zip(prompts, own, strict=True) if keep for x in samples]
        sampled: Iterator[PromptGroup] = iter(rollout(trainer, asked, count)[1] if asked else [])
        recorded = iter(
            self.groups([samples[0] for samples, keep in zip(prompts, own, strict=True) if not keep], count)
        )
        return [next(sampled if keep else recorded) for keep in own]

    def groups(self, samples: Sequence[Mapping[str, Any]], count: int) -> list[PromptGroup]:
        """Prompts with their recorded responses.

        Args:
            samples: one per prompt.
            count: responses to each.

        Raises:
            ConfigError: a sample without as many, or whose responses are not in its teacher's cache.
        """
        trainer, column = self._trainer, self._trainer.args.teacher_column
        tokenizer, found = tokenizer_of(trainer.processing_class), []
        options = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        given = [sample.get("responses") for sample in samples]
        answers = [() if x is None else recorded_ids(tokenizer, x, self._end)[:count] for x in given]
        groups = encode_groups(
            trainer.processing_class, samples, answers, trainer.placeholder_ids, trainer.accelerator.device, **options
        )
        for sample, recorded, group in zip(samples, given, groups, strict=True):
            cache = self._caches.get("" if column is None else sample[column])
            key = None if cache is None else prompt_fingerprint(group)
            if cache is not None and recorded is None:
                responses = cache.responses(key)[:count]
                group = replace(group, responses=tuple(torch.tensor(x, dtype=torch.int64) for x in responses))
            _check_group(group, cache, key, count)
            found.append(group)
        if found:
            check_prompt_lengths([group.prompt_ids for group in found], trainer.args.max_prompt_length, True)
        return found


def _check_group(group: PromptGroup, cache: StateCache | None, key: str | None, count: int) -> None:
    """Stop at a prompt without its responses, or at a cache (where the prompt has this key) that was made of others."""
    kept = cache is None or all(cache.find(key, response) is not None for response in group.responses)
    if not kept or (cache is not None and not group.responses):
        raise ConfigError(
            f"{cache.facts.what} has no states of a recorded response: it was made of other prompts or responses. "
            "Make it anew by `vgs cache-teacher`."
        )
    if len(group.responses) < count:
        raise ConfigError(f"a prompt has {len(group.responses)} recorded responses, expected num_generations={count}.")


def check_recorded(
    data: Any,
    what: str,
    values: Sequence[Any],
    processor: Any,
    args: Any,
    *,
    forbidden: Sequence[int],
    vocabulary: int,
    **template_options: Any,
) -> None:
    """Stop before training at recorded responses that cannot be used.

    Args:
        data: the training data. what: its name, for the message.
        values: of its column ``responses``.
        processor: the student's.
        args: the run's settings.
        forbidden, vocabulary: see ``vgs.data.recorded.bad_recordings``.
        **template_options: for the chat template.

    Raises:
        ConfigError: such a row; the first few are named.
    """
    bad = bad_recordings(
        values,
        tokenizer_of(processor),
        end_of_turn(processor, **template_options),
        count=args.num_generations,
        longest=args.max_completion_length,
        forbidden=forbidden,
        vocabulary=vocabulary,
    )
    if not bad:
        return
    numbers = getattr(data, "indices", range(len(values)))
    listed = "; ".join(f"row {numbers[index]}: {says}" for index, says in bad[:SHOWN])
    raise ConfigError(
        f"the recorded responses of {what} cannot be used in {len(bad)} of {len(values)} rows ({listed})."
    )


def check_caches(sources: Mapping[str, TeacherSource], fraction: float) -> None:
    """Stop where a run's share of sampled responses, and what its teachers can score, do not fit.

    Args:
        sources: of the teachers, by name.
        fraction: ``on_policy_fraction``, 1 of trainers that have none.

    Raises:
        ConfigError: a cache in a run that samples everything, or a teacher that cannot score what the student samples.
    """
    for name, source in sources.items():
        what = f"teacher {name!r}" if name else "the teacher"
        if fraction == 1 and source.cache is not None:
            raise ConfigError(
                f"the cache of {what} has no effect with on_policy_fraction=1: it holds recorded responses, and the "
                "student samples all of them. Set on_policy_fraction below 1, or leave the cache out."
            )
        if fraction > 0 and not source.live:
            raise ConfigError(
                f"on_policy_fraction={fraction} needs a path or a url of {what} beside its cache, which knows nothing "
                "of what the student samples. Or set on_policy_fraction=0."
            )
