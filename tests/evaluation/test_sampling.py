"""One way to ask a model: what the trainers ask, and nothing that a checkpoint brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from real_checkpoints import photo_samples
from tiny import VISION_START, tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import make_trainer
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.fsdp import is_fsdp_managed_module

from vgs import VGSConfig, evaluate_accuracy
from vgs.errors import ConfigError
from vgs.evaluation import sampling
from vgs.evaluation.sampling import Sampling, own_generation_config, sample_responses
from vgs.trainers.rollouts import greedy_decoding

GREEDY = Sampling(max_new_tokens=5)
ASKED = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 11,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "generation_kwargs": {"suppress_tokens": [20], "no_repeat_ngram_size": 3},
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize("options", [{}, ASKED], ids=["defaults", "all"])
def test_the_trainers_rollouts_are_asked_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **options)
    tokenizer = trainer.processing_class.tokenizer
    for greedy in (False, True):
        sampling = Sampling.from_settings(trainer.args, greedy=greedy)
        if not greedy:
            theirs = trainer.generation_config.to_dict()
        else:
            with greedy_decoding(trainer):
                theirs = trainer.generation_config.to_dict()
        assert sampling.generation_config(trainer.model, tokenizer).to_dict() == theirs
    assert sampling.template_options == options.get("chat_template_kwargs", {})


def test_settings_may_be_a_part_of_a_config() -> None:
    args = VGSConfig(**trainer_options(Path("x"), **ASKED))
    whole, part = (Sampling.from_settings(x, greedy=True) for x in (args, {"max_completion_length": 6, **ASKED}))
    assert whole == part != Sampling.from_settings({"max_completion_length": 7}, greedy=True)


def test_a_checkpoint_brings_its_end_tokens_alone() -> None:
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(4)
    expected = sample_responses(model, processor, samples, GREEDY, progress=False)
    model.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=9)
    assert sample_responses(model, processor, samples, GREEDY, progress=False) == expected
    assert model.generation_config.repetition_penalty == 50.0
    asked = replace(GREEDY, repetition_penalty=50.0)
    assert sample_responses(model, processor, samples, asked, progress=False) != expected


def test_an_adapters_base_brings_nothing_either() -> None:
    """PEFT's wrapper hands its generation config on to the model inside."""
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(4)
    expected = sample_responses(model, processor, samples, GREEDY, progress=False)
    model.generation_config.update(repetition_penalty=50.0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert sample_responses(wrapped, processor, samples, GREEDY, progress=False) == expected
    assert model.generation_config.repetition_penalty == wrapped.generation_config.repetition_penalty == 50.0


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_of_a_sharded_model_run_equally_many_forwards(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(sampling, "is_sharded", lambda x: sharded and x is model)
    with own_generation_config(model):
        assert is_fsdp_managed_module(model) == sharded  # what transformers' generation asks
    assert not is_fsdp_managed_module(model)


def test_a_tokenizer_without_a_padding_token() -> None:
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(4)
    expected = sample_responses(model, processor, samples, GREEDY, progress=False)
    processor.tokenizer.pad_token = None
    assert processor.tokenizer.pad_token_id is None
    assert sample_responses(model, processor, samples, GREEDY, progress=False) == expected


def test_template_options_reach_the_template() -> None:
    model, processor, samples = tiny_model(0), tiny_processor(), tiny_samples(3)
    plain = sample_responses(model, processor, samples, GREEDY, progress=False)
    processor.chat_template += "{% if enable_thinking is defined %} red red red{% endif %}"
    assert sample_responses(model, processor, samples, GREEDY, progress=False) == plain
    thinking = replace(GREEDY, template_options={"enable_thinking": True})
    assert sample_responses(model, processor, samples, thinking, progress=False) != plain


def test_a_sample_that_cannot_be_encoded_is_named() -> None:
    samples = tiny_samples(5)
    samples[3] = {**samples[3], "images": samples[3]["images"] * 2, "prompt": [{"role": "user", "content": []}]}
    with pytest.raises(ConfigError, match=r"^sample 3: images has 2 entries, but the prompt has places for 0"):
        sample_responses(tiny_model(0), tiny_processor(), samples, GREEDY, batch_size=2, progress=False)
    samples[3] = {"prompt": [{"role": "user", "content": f"red {VISION_START} ?"}], "images": []}
    with pytest.raises(ConfigError, match=r"^sample 3: the prompt has the image placeholder <\|vision_start\|>"):
        sample_responses(tiny_model(0), tiny_processor(), samples, GREEDY, batch_size=2, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma4", "llava_pixtral"])
def test_real_families(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Answers to a batch of different prompts are those to each alone, by the library's own calls."""
    folder = checkpoint(family)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, samples = AutoProcessor.from_pretrained(folder), photo_samples(tmp_path)
    answers = sample_responses(model, processor, samples, GREEDY, progress=False)
    config = GREEDY.generation_config(model, processor.tokenizer)
    for sample, answer in zip(samples, answers, strict=True):
        images = [{"type": "image", "image": image} for image in sample["images"]]
        content = [*images, {"type": "text", "text": sample["prompt"][0]["content"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        alone = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()
        assert alone == answer
    found = evaluate_accuracy(model, processor, samples, lambda text, gold: gold == "seven", sampling=GREEDY)
    assert (found["accuracy"], found["samples"]) == (1.0, 3)
