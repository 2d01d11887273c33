"""The states that enter the head are those of the model's own forward, and no logits are formed for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from allocations import AllocationMeter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vgs.models.heads import output_layer, read_head
from vgs.models.states import final_states
from vgs.models.wrappers import run_inside

VOCABULARY = 4096
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3, 39)[None]  # more than the width: logits are larger than any gradient
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT))


def _minicpm3() -> nn.Module:
    """Divides what its body returns by 4 before the head."""
    latent = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    return hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**TEXT | heads | latent, dim_model_base=8))


def _llama4() -> nn.Module:
    """The head belongs to the text model inside the body."""
    experts = {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    vision = {**sizes, **widths, "intermediate_size": 128}
    config = hf.Llama4Config(text_config={**TEXT, **experts}, vision_config=vision, image_token_index=60)
    return hf.Llama4ForConditionalGeneration(config)


def _nemotron() -> nn.Module:
    """As Llama 4; its text model has state-space layers."""
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    text = {**TEXT, **mamba, "model_type": "nemotron_h", "layers_block_type": ["mamba", "attention"]}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "video_temporal_patch_size": 2}
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config={"model_type": "radio", **vision},
        vision_hidden_size=32,
        projector_hidden_size=32,
        image_token_id=60,
    )
    return hf.NemotronH_Omni_Reasoning_V3(config)


def _chameleon() -> nn.Module:
    """Masks columns of its logits."""
    names = {f"IMGIMG{chr(65 + place)}Z": 40 + place for place in range(8)} | {"<image>": 50}
    sizes = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32}
    codes = {**sizes, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    config = hf.ChameleonConfig(**TEXT, vq_config=codes, vocabulary_map=names)
    return hf.ChameleonForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "qwen3": _qwen3,
    "minicpm3": _minicpm3,
    "llama4": _llama4,
    "chameleon": _chameleon,
}
if hasattr(hf, "NemotronH_Omni_Reasoning_V3"):  # not in the oldest library
    BUILDERS["nemotron_h_omni"] = _nemotron


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def own_logits(model: nn.Module) -> Tensor:
    """Logits of the model's own forward, as they leave the head and what follows it."""
    text = model.language_model if isinstance(model, hf.Llama4ForConditionalGeneration) else model
    return text(**INPUTS).logits  # Llama 4's wrapper adds nothing to them


@pytest.mark.parametrize("family", BUILDERS)
def test_the_head_on_the_states_gives_the_models_logits(family: str) -> None:
    """The first time, and once it is known where they come from; gradients as well."""
    model = built(family)
    logits = own_logits(model)
    shown = logits.detach() > -1e30
    (logits * shown).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for _ in range(2):
        model.zero_grad()
        read = read_head(model, torch.float32).logits(final_states(model, **INPUTS))
        torch.testing.assert_close(read[shown], logits[shown], rtol=1e-5, atol=1e-5)
        (read * shown).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        scale = float(max(value.abs().max() for value in expected.values()))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", BUILDERS)
def test_no_tensor_of_all_logits_is_formed(family: str) -> None:
    model = built(family)
    for _ in range(2):
        with AllocationMeter() as meter:
            final_states(model, **INPUTS).sum().backward()
        assert meter.largest < 4 * IDS.numel() * VOCABULARY


@pytest.mark.parametrize("family", ["minicpm3", "llama4"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_states_with_adapters_and_gradient_checkpointing(family: str, reentrant: bool) -> None:
    peft = pytest.importorskip("peft")
    plain = built(family)
    expected = final_states(plain, **INPUTS).detach()
    model = peft.get_peft_model(built(family), peft.LoraConfig(target_modules=["o_proj"], r=2))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):
        states = final_states(model, **INPUTS)  # a new adapter is the identity
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        states.sum().backward()
    changed = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert changed and all("lora_B" in name for name in changed)


@torch.no_grad()
def test_hooks_on_every_module_run_to_their_end() -> None:
    """Sharded layers are gathered before their forward, and given back behind it."""
    model, entered, left = built("llama4"), [], []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: entered.append(module))
        module.register_forward_hook(lambda module, _, __: left.append(module))
    for _ in range(2):
        final_states(model, **INPUTS)
        assert entered and sorted(map(id, entered)) == sorted(map(id, left))
    assert output_layer(model) in left


def test_states_of_sharded_models(tmp_path: Path) -> None:
    """FSDP2 around every layer, the head and the whole: values and gradients, step after step."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for family in BUILDERS.keys() & {"minicpm3", "llama4", "nemotron_h_omni"}:
            plain, model = built(family), built(family)
            states = final_states(plain, **INPUTS)
            states.square().sum().backward()
            expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
            layers = next(x for name, x in model.named_modules() if name.endswith("layers") and "vision" not in name)
            tied = output_layer(model).weight is model.get_input_embeddings().weight
            for part in (*layers, *(() if tied else (output_layer(model),)), model):
                fully_shard(part, mesh=mesh)
            for _ in range(3):
                model.zero_grad()
                loss, found = run_inside(model, partial(_task, model))
                loss.backward()
                torch.testing.assert_close(found, states, rtol=0, atol=1e-5)
                own = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
                assert own.keys() == expected.keys()
                for name, value in expected.items():
                    torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def _task(model: nn.Module) -> tuple[Tensor, Tensor]:
    states = final_states(model, **INPUTS)
    return states.square().sum(), states


@torch.no_grad()
def test_the_head_is_itself_again() -> None:
    for family in ("qwen3", "minicpm3"):
        model = built(family)
        before = dict(vars(model.lm_head))
        final_states(model, **INPUTS)
        assert vars(model.lm_head).keys() == before.keys() and not model.model._forward_hooks
        with pytest.raises((TypeError, AttributeError)):
            final_states(built(family), **INPUTS, position_ids="first")
        assert vars(model.lm_head).keys() == before.keys()


@torch.no_grad()
def test_a_forward_without_its_head_is_refused() -> None:
    class Headless(hf.Qwen3ForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    with pytest.raises(ValueError, match=r"^Headless\.forward does not call its output head, a Linear\.$"):
        final_states(Headless(hf.Qwen3Config(**TEXT)).eval(), **INPUTS)
