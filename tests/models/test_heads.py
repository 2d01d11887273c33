"""Heads of PEFT students: ``read_head`` against the logits and the gradients of the model itself (sharded ones:
tests/test_one_step.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny_model
from torch import Tensor, nn

from vgs.models.heads import Head, head_parameters, read_head
from vgs.models.states import final_states

IDS = torch.tensor([[8, 9, 10, 11, 12, 13]])
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "backbone": LoraConfig(**LORA),
    "saved head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "lora head": LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]}),
    "lora head alone": LoraConfig(**{**LORA, "target_modules": ["lm_head"]}),
    "lora head with bias": LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, lora_bias=True),
    "rank-stabilised": LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, use_rslora=True),
    "saved embedding": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "tied embedding": LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora embedding": LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [9, 20]}),
    "tokens alone": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[9, 20]),
}


def student(name: str, tie: bool) -> nn.Module:
    """A PEFT student whose adapters are not at their start, where they change nothing."""
    model = get_peft_model(tiny_model(0, tie=tie), CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def states(model: nn.Module) -> Tensor:
    return model.base_model.model.base_model(input_ids=IDS, use_cache=False).last_hidden_state


def apply(head: Head, rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, head.weight, head.bias)


def loss_of(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (torch.log_softmax(logits, dim=-1) * weights).sum()


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(logits).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_the_models_own(name: str, tie: bool) -> None:
    model = student(name, tie)
    expected = model(input_ids=IDS).logits
    expected_gradients = gradients(model, expected)
    actual = apply(read_head(model, torch.float32), states(model))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual_gradients = gradients(model, actual)
    assert actual_gradients.keys() == expected_gradients.keys() != set()
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[key], gradient, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["saved head", "lora head", "tokens"])
def test_disabled_adapters_leave_the_original_head(name: str) -> None:
    model = student(name, tie=True)
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
        actual = apply(read_head(model, torch.float32), states(model))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)


@pytest.mark.parametrize("disabled", [False, True])
def test_merged_adapters(disabled: bool) -> None:
    model = student("lora head", tie=False)
    before = model(input_ids=IDS).logits
    with model.disable_adapter():
        original = model(input_ids=IDS).logits
    model.merge_adapter()
    if disabled:
        model.base_model.disable_adapter_layers()
    actual = apply(read_head(model, torch.float32), states(model))
    torch.testing.assert_close(actual, original if disabled else before, atol=1e-4, rtol=1e-4)


def test_the_active_adapter_counts() -> None:
    model = student("lora head", tie=False)
    model.add_adapter("other", LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, init_lora_weights=False))
    first = read_head(model, torch.float32).weight
    model.set_adapter("other")
    second = read_head(model, torch.float32).weight
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(apply(Head(second, None, 1.0, None), states(model)), model(input_ids=IDS).logits)


def test_small_updates_survive_autocast_and_casting_follows_the_hidden_states() -> None:
    model = student("lora head alone", tie=False)
    exact = read_head(model, torch.float32).weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(read_head(model, torch.float32).weight, exact)
    assert read_head(model, torch.bfloat16).weight.dtype == torch.bfloat16


def test_an_unused_adapter_is_a_parameter_to_gather() -> None:
    model = student("lora head", tie=False)
    layer = model.base_model.model.lm_head
    wanted = [layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert {id(p) for p in head_parameters(model)} == {id(p) for p in wanted}


def test_adapters_injected_into_a_plain_model() -> None:
    model = inject_adapter_in_model(CONFIGS["lora head alone"], tiny_model(0, tie=False))
    nn.init.normal_(model.lm_head.lora_B["default"].weight)
    rows = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(apply(read_head(model, torch.float32), rows), model(input_ids=IDS).logits)


def test_dropout_in_a_lora_head() -> None:
    model = get_peft_model(tiny_model(0), LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"lora_dropout must be 0 for a LoRA output head, got 0\.1"):
        read_head(model.train(), torch.float32)
    read_head(model.eval(), torch.float32)  # no dropout outside training


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, use_dora=True), LoHaConfig(target_modules=["lm_head"])],
    ids=["dora", "loha"],
)
def test_other_adapters_on_the_head(config: LoraConfig | LoHaConfig) -> None:
    model = get_peft_model(tiny_model(0, tie=False), config)
    with pytest.raises(TypeError, match="only plain LoRA can be read"):
        read_head(model, torch.float32)
    model.merge_adapter()
    torch.testing.assert_close(
        apply(read_head(model, torch.float32), states(model)), model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5
    )


TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
TEXT_MODELS = {
    "cohere2": (transformers.Cohere2Config, {"logit_scale": 0.25}, (0.25, None)),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 8.0}, (0.125, None)),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "falcon_h1": (
        transformers.FalconH1Config,
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2},
        (0.5, None),
    ),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_factor_and_cap_of_a_text_model(name: str) -> None:
    kind, options, expected = TEXT_MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**TEXT, **options)).eval()
    head = read_head(model, torch.float32)
    assert (head.logit_scale, head.softcap) == expected
    torch.testing.assert_close(head.logits(final_states(model, input_ids=IDS)), model(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["aya_vision", "cohere2_vision", "gemma4", "llava", "qwen3_vl"])
def test_a_wrapper_has_the_head_that_its_own_forward_applies(family: str, checkpoint: Callable[..., Path]) -> None:
    """AyaVision leaves out the factor of its text config, 0.25; Gemma 4 has the cap of its own."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
    head = read_head(model, torch.float32)
    assert (head.logit_scale, head.softcap) == (1.0, 30.0 if family == "gemma4" else None)
    torch.testing.assert_close(head.logits(final_states(model, input_ids=IDS)), model(input_ids=IDS).logits)


class Wrapper(transformers.Qwen3VLForConditionalGeneration):
    """Has no body without a head, as Llama 4's wrapper."""

    base_model_prefix = "none"

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@torch.no_grad()
def test_states_of_a_body_that_holds_its_head() -> None:
    model = tiny_model(0)
    expected = final_states(model, input_ids=IDS)
    model.__class__ = Wrapper
    assert model.base_model is model
    assert torch.equal(final_states(model, input_ids=IDS), expected)
    torch.testing.assert_close(read_head(model, torch.float32).logits(expected), model(input_ids=IDS).logits)


def test_quantised_head() -> None:
    model = tiny_model(0, tie=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(31, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"16-bit or float32 weight, got Linear with a torch\.int8 weight"):
        read_head(model, torch.float32)
