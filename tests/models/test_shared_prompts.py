"""A prompt is read once for all responses that ``generate`` samples to it, and they are drawn as without that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from covering import slow_beyond
from families import rows_read, separate_rows, shaken
from linear_families import CONFIGS, OTHERS, TEXT, text_model
from real_checkpoints import FIELD_FAMILIES, REAL_FAMILIES, photo_samples
from tiny import tiny_model, tiny_processor, tiny_samples
from torch import Tensor, nn

from vgs import encode_groups
from vgs.data.prompts import encode_prompts
from vgs.data.responses import cut_responses
from vgs.evaluation.sampling import Sampling, own_generation_config, respond
from vgs.models.families import placeholder_ids
from vgs.models.heads import read_head, token_logps
from vgs.models.shared_prompts import ENCODED, prompts_once

SAMPLED = Sampling(max_new_tokens=6, greedy=False)
RETURNED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
#: Those that run every time: positions of their own, a window, convolutions and states, pictures in lists and tiles.
USUAL = ("qwen2_5_vl", "qwen3_5", "gemma3", "smolvlm", "lfm2_vl", "glm4v", "granite4_vision", "llava_pixtral")
FAMILIES = [x for x in (*REAL_FAMILIES, *FIELD_FAMILIES) if x != "nemotron_h_omni"]  # whose body is not its base_model
TEXTS = {
    **{stack: lambda stack=stack: text_model(stack) for stack in (*CONFIGS, *OTHERS)},
    "qwen3": lambda: shaken(hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=16))),
    "mamba": lambda: shaken(hf.MambaForCausalLM(hf.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2))),
}


def sampled(model: nn.Module, inputs: dict[str, Tensor], shared: bool = True, **config: Any) -> tuple[Any, list]:
    """What ``generate`` returns from seed 0, and the sizes of what the language model was given."""
    torch.manual_seed(0)
    once = prompts_once(model) if shared else nullcontext()
    with torch.no_grad(), rows_read(model) as seen, own_generation_config(model), once:
        output = model.eval().generate(**inputs, generation_config=hf.GenerationConfig(**RETURNED | config))
    return output, seen


def same_draws(actual: Any, expected: Any) -> None:
    """The same tokens, from scores that differ by rounding."""
    assert torch.equal(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def text_inputs() -> dict[str, Tensor]:
    """Three prompts of unequal lengths."""
    ids = torch.randint(6, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 4), (2, 7)):
        ids[row, :padding] = mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


TEXT_CONFIG = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0, "eos_token_id": 5, "num_return_sequences": 4}


def vision_inputs(model: nn.Module, samples: list[dict]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A batch of the tiny Qwen3-VL, and how ``generate`` is asked for four responses to each prompt."""
    processor = tiny_processor()
    ids, mask, fields = encode_prompts(processor, samples, placeholder_ids(model.config))
    config = SAMPLED.generation_config(model, processor.tokenizer).to_diff_dict()
    return {"input_ids": ids, "attention_mask": mask, **fields}, {**config, "num_return_sequences": 4}


@pytest.mark.parametrize("family", slow_beyond(USUAL, FAMILIES))
def test_pictures(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Prompts with one picture, two and none: every token was drawn with the log-probability that one plain forward
    over its own sequence gives it. (transformers' own repetition mixes pictures up in GLM-4V, SmolVLM and Granite.)"""
    folder = checkpoint(family)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    processor, samples = hf.AutoProcessor.from_pretrained(folder), photo_samples(tmp_path)
    forbidden = placeholder_ids(model.config)
    ids, mask, fields = encode_prompts(processor, samples, forbidden)
    config = SAMPLED.generation_config(model, processor.tokenizer)
    inputs = {"input_ids": ids, "attention_mask": mask, **fields}
    ways: list[dict[str, Any]] = [{}]
    if ENCODED in inspect.signature(model.forward).parameters:  # else the library repeats pixels itself, and wrongly
        ways.append({"output_hidden_states": True})  # by which the prompts are read for every response
    for options in ways:
        output, seen = sampled(model, inputs, **config.to_diff_dict(), num_return_sequences=4, **options)
        assert {rows for rows, columns in seen if columns > 1} == {12 if options else 3}
        assert {rows for rows, columns in seen if columns == 1} == {12}
        responses = cut_responses(output.sequences[:, ids.shape[1] :], config.eos_token_id)
        groups = encode_groups(processor, samples, [responses[i : i + 4] for i in (0, 4, 8)], forbidden)
        logits = torch.stack(output.logits, 1).log_softmax(-1)
        head, chosen = read_head(model, torch.float32), 0
        for group in groups:
            expected = token_logps(separate_rows(model, group, True), torch.cat(group.responses), head, 1.0)
            found = [
                row[: len(response)].gather(1, response[:, None])[:, 0]
                for row, response in zip(logits[chosen : chosen + 4], group.responses, strict=True)
            ]
            torch.testing.assert_close(torch.cat(found), expected, atol=5e-5, rtol=1e-5)
            chosen += 4


@pytest.mark.parametrize("stack", slow_beyond(("qwen3", "lfm2", "nemotron_h", "qwen3_next"), TEXTS))
def test_states_of_every_kind(stack: str) -> None:
    """Linear attention, convolutions, state spaces, latent attention: the draws are those of repeated prompts."""
    torch.manual_seed(0)
    model, inputs = TEXTS[stack](), text_inputs()
    output, seen = sampled(model, inputs, **TEXT_CONFIG)
    assert seen[:2] == [(3, 9), (12, 1)]
    same_draws(output, sampled(model, inputs, False, **TEXT_CONFIG)[0])


def mllama() -> nn.Module:
    text = {
        **TEXT,
        "bos_token_id": 1,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision = {
        **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
        **dict.fromkeys(("attention_heads", "num_hidden_layers"), 2),
        **dict.fromkeys(("num_global_layers", "max_num_tiles"), 1),
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1]],
    }
    config = hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=59)
    return shaken(hf.MllamaForConditionalGeneration(config))


def idefics() -> nn.Module:
    vision = {"embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"additional_vocab_size": 0, "cross_layer_interval": 1, "use_resampler": False}
    return shaken(hf.IdeficsForVisionText2Text(hf.IdeficsConfig(**TEXT, **options, vision_config=vision)))


def test_states_of_pictures_are_repeated_too() -> None:
    """Mllama attends to pictures through a cache of their own."""
    torch.manual_seed(0)
    model, one = mllama(), torch.ones(3, 1, dtype=torch.int64)
    pictures = {"pixel_values": torch.randn(3, 1, 1, 3, 16, 16), "aspect_ratio_ids": one}
    masks = {"aspect_ratio_mask": one[..., None], "cross_attention_mask": one[:, None, None].expand(3, 9, 1, 1)}
    inputs = {**text_inputs(), **pictures, **masks}
    output, seen = sampled(model, inputs, **TEXT_CONFIG)
    assert seen[:2] == [(3, 9), (12, 1)]
    same_draws(output, sampled(model, inputs, False, **TEXT_CONFIG)[0])
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(output.scores[0], sampled(model, other, **TEXT_CONFIG)[0].scores[0]), "pictures matter"


def test_a_model_that_keeps_more_than_a_cache() -> None:
    """Idefics hands the states of its pictures on, RecurrentGemma keeps its own: both read the repeated prompts."""
    torch.manual_seed(0)
    pictures = {"pixel_values": torch.randn(3, 1, 3, 16, 16), "image_attention_mask": torch.ones(3, 9, 1).long()}
    small = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "lru_width": 32}
    gemma = hf.RecurrentGemmaConfig(**small, num_hidden_layers=3, attention_window_size=6)
    for model, fields in ((idefics(), pictures), (hf.RecurrentGemmaForCausalLM(gemma), {})):
        inputs = {**text_inputs(), **fields}
        output, seen = sampled(model, inputs, **TEXT_CONFIG)
        assert (12, 9) in seen
        expected = sampled(model, inputs, False, **TEXT_CONFIG)[0]
        assert torch.equal(output.sequences, expected.sequences)
        assert all(map(torch.equal, output.scores, expected.scores))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 11, "min_p": 0.02},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 5, "eos_token_id": list(range(6, 30))},
        {"suppress_tokens": list(range(6, 40)), "begin_suppress_tokens": [41]},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 4},
        {"max_length": 11, "max_new_tokens": None},
    ],
    ids=str,
)
def test_settings_keep_their_meaning(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs, config = TEXTS["qwen3"](), text_inputs(), TEXT_CONFIG | options
    output, seen = sampled(model, inputs, **config)
    assert seen[0][0] == 3
    same_draws(output, sampled(model, inputs, False, **config)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"num_beams": 4},
        {"cache_implementation": "static", "disable_compile": True},
        {"output_attentions": True},
    ],
    ids=str,
)
def test_settings_that_need_repeated_prompts(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs, config = TEXTS["qwen3"](), text_inputs(), TEXT_CONFIG | options
    model.set_attn_implementation("eager")  # which alone returns attentions
    output, seen = sampled(model, inputs, **config)
    assert seen[0] == (12, 9)
    expected = sampled(model, inputs, False, **config)[0]
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(torch.equal, output.scores, expected.scores))


def test_an_encoder_with_a_decoder_is_asked_as_ever() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    config = TEXT_CONFIG | {"decoder_start_token_id": 0}
    found, expected = (sampled(model, text_inputs(), shared, **config)[0] for shared in (True, False))
    assert torch.equal(found.sequences, expected.sequences)


def test_one_response_is_drawn_as_ever() -> None:
    """To the last bit; and nothing stays on the model."""
    model = tiny_model(0)
    inputs, config = vision_inputs(model, tiny_samples(3))
    found, expected = (sampled(model, inputs, x, **config | {"num_return_sequences": 1})[0] for x in (True, False))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.scores, expected.scores))
    sampled(model, inputs, **config)
    assert not {"_prefill", "_expand_inputs_for_generation"} & set(vars(model))


def test_an_adapter_shares_too() -> None:
    model = tiny_model(0)
    inputs, config = vision_inputs(model, tiny_samples(3))
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    output, seen = sampled(wrapped, inputs, **config)
    assert seen[0] == tuple(inputs["input_ids"].shape)
    same_draws(output, sampled(wrapped, inputs, False, **config)[0])


def test_an_end_token_at_the_first_place() -> None:
    """Some responses end there and the others go on; each is what repeated prompts give."""
    model = tiny_model(0)
    inputs, config = vision_inputs(model, tiny_samples(3))
    config |= {"eos_token_id": list(range(20, 34)), "pad_token_id": 0}
    output, seen = sampled(model, inputs, **config)
    responses = cut_responses(output.sequences[:, inputs["input_ids"].shape[1] :], config["eos_token_id"])
    lengths = [len(response) for response in responses]
    assert 1 in lengths and max(lengths) > 1 and seen[0][0] == 3
    assert output.sequences[lengths.index(1), inputs["input_ids"].shape[1] + 1 :].eq(0).all()
    same_draws(output, sampled(model, inputs, False, **config)[0])


def test_first_tokens_are_drawn_each_on_its_own() -> None:
    """512 responses to each of two prompts: tokens as often as they are probable, and neighbours no more alike than
    chance has it."""
    count, model, samples = 512, tiny_model(0), tiny_samples(2)
    inputs, config = vision_inputs(model, samples)
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "num_generations": count, "batch_size": 2 * count, "temperature": 1.5}
    found = respond(model, tiny_processor(), samples, **options)
    once = config | {"max_new_tokens": 1, "num_return_sequences": 1, "temperature": 1.5}
    probabilities = sampled(model, inputs, False, **once)[0].scores[0].softmax(-1)
    for responses, expected in zip(found, probabilities, strict=True):
        tokens = torch.tensor(responses)[:, 0]
        shares = torch.bincount(tokens, minlength=len(expected)) / count
        error = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() <= 4 * error + 1e-9).all()
        alike = (tokens[1:] == tokens[:-1]).float().mean()
        chance = expected.square().sum()
        assert abs(alike - chance) < 4 * (chance / count).sqrt() and chance < 0.8
