"""Greedy accuracy, and the responses behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_processor, tiny_samples

from vgs.data.responses import response_texts
from vgs.errors import ConfigError
from vgs.evaluation.accuracy import evaluate_accuracy
from vgs.evaluation.sampling import Sampling, sample_responses
from vgs.models.families import placeholder_ids

LENGTH = 5
GREEDY = Sampling(max_new_tokens=LENGTH)


def test_greedy_responses_do_not_depend_on_the_batch() -> None:
    model, processor, samples = tiny_model(0).train(), tiny_processor(), tiny_samples(5)
    whole, single = (
        sample_responses(model, processor, samples, GREEDY, batch_size=size, progress=False) for size in (8, 1)
    )
    assert whole == single and len(whole) == 5 and model.training
    end = processor.tokenizer.eos_token_id
    assert all(len(ids) == LENGTH or ids[-1] == end for ids in whole)
    assert not {end} & {token for ids in whole for token in ids[:-1]}
    assert not set(placeholder_ids(model.config)) & {token for ids in whole for token in ids}


def test_sampled_responses_follow_torchs_generator() -> None:
    model, processor, samples = tiny_model(0, scale=0.05), tiny_processor(), tiny_samples(3)

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return sample_responses(model, processor, samples, replace(GREEDY, greedy=False), progress=False)

    assert drawn(0) == drawn(0) != drawn(1)


def test_every_end_token_of_the_model_ends_a_response() -> None:
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(2)
    first = sample_responses(model, processor, samples, GREEDY, progress=False)[0]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, first[1]]
    found = sample_responses(model, processor, samples, GREEDY, progress=False)[0]
    assert found == first[: first.index(first[1]) + 1]


def test_accuracy_counts_what_the_scorer_accepts() -> None:
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(4)
    answers = sample_responses(model, processor, samples, GREEDY, progress=False)
    texts = response_texts(processor, answers)
    calls = []

    def scorer(text: str, gold: str) -> bool:
        calls.append((text, gold))
        return gold in "ab"

    found = evaluate_accuracy(model, processor, samples, scorer, batch_size=3, sampling=GREEDY)
    assert found == {"accuracy": 0.5, "samples": 4, "mean_length": sum(map(len, answers)) / 4}
    assert calls == list(zip(texts, "abcd", strict=True))


def test_samples_without_gold_answers_are_refused() -> None:
    samples = [{key: value for key, value in sample.items() if key != "answer"} for sample in tiny_samples(2)]
    for wrong in (samples, []):
        with pytest.raises(ConfigError, match=f"samples must have gold answers in 'answer', got {len(wrong)} samples"):
            evaluate_accuracy(tiny_model(0), tiny_processor(), wrong)


def test_samples_without_a_gold_answer_do_not_count() -> None:
    samples = [{**sample, "answer": gold} for sample, gold in zip(tiny_samples(4), ("a", None, "b", None), strict=True)]
    asked: list[str] = []

    def scorer(text: str, gold: str) -> bool:
        asked.append(gold)
        return gold == "a"

    options = {"batch_size": 4, "sampling": Sampling(max_new_tokens=2)}
    result = evaluate_accuracy(tiny_model(), tiny_processor(), samples, scorer, **options)
    assert asked == ["a", "b"]
    assert (result["accuracy"], result["samples"]) == (0.5, 2)
    with pytest.raises(ConfigError, match="None of the 4 samples has a gold answer"):
        evaluate_accuracy(
            tiny_model(), tiny_processor(), [{**sample, "answer": None} for sample in samples], scorer, **options
        )
