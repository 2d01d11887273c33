"""Predicted memory: against tensors of real tiny models where they can be counted, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_checkpoint, tiny_model
from transformers.optimization import Adafactor

from vgs.models.families import freeze
from vgs.planning.advice import PASS_MULTIPLE, advise, largest_pass
from vgs.planning.memory import GIB, PHASES, Lengths, Machine, Plan, optimizer_bytes, predict, tensor_bytes, value_bytes
from vgs.planning.model_size import QWEN3_VL, ModelSize

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
RUN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 32, "max_completion_length": 2048}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with configs: Qwen3-VL without weights, and tiny ones with."""
    root = tmp_path_factory.mktemp("models")
    for name, config in QWEN3_VL.items():
        config().save_pretrained(root / name)
    save_tiny_checkpoint(root / "tiny", seed=0)
    save_tiny_checkpoint(root / "wide", seed=1, hidden=48, tie=False)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def tiny_run(models: dict[str, str]) -> dict[str, Any]:
    return {"student": {"path": models["tiny"]}, "teacher": {"path": models["wide"]}, "training": {"bf16": False}}


@pytest.fixture
def large_run(models: dict[str, str]) -> dict[str, Any]:
    """The paper's 8B to 2B, with rollouts by Hugging Face."""
    return {
        "student": {"path": models["2B"]},
        "teacher": {"path": models["8B"], "dtype": "bfloat16"},
        "training": dict(RUN),
    }


def with_training(config: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {**config, "training": {**config["training"], **training}}


def part(plan: Plan, name: str, phase: str = "student") -> int:
    return plan.parts.get(name, {}).get(phase, 0)


@pytest.mark.parametrize("lora", [None, LORA, {**LORA, "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("frozen", [{}, {"vision": True}, {"embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_states_are_exact(
    tiny_run: dict, lora: dict | None, frozen: dict[str, bool], dtype: str
) -> None:
    model = tiny_model().to(getattr(torch, dtype))
    if lora:
        model = get_peft_model(model, LoraConfig(**lora))
    freeze(model, **frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]

    config = with_training(tiny_run, **{f"freeze_{name}": value for name, value in frozen.items()})
    config["student"]["dtype"] = dtype
    plan = predict({**config, "lora": lora}, Machine(), Lengths())
    assert part(plan, "student weights") == tensor_bytes(model.parameters())
    assert part(plan, "gradients") == tensor_bytes(parameter.grad for parameter in trained)
    assert part(plan, "optimizer states") == tensor_bytes(states)
    head = model.get_output_embeddings()
    trains_head = any(parameter.requires_grad for parameter in head.parameters())
    assert part(plan, "loss: head gradient") == trains_head * 4 * 32 * 32


def test_adafactor_states_are_exact() -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in [(6, 4), (5,), (3, 2, 7)]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Adafactor(parameters)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    assert optimizer_bytes("adafactor", parameters) == tensor_bytes(states)


def test_optimizers_that_are_known_by_bytes() -> None:
    weight = torch.empty(10, 3)
    known = {name: optimizer_bytes(name, [weight]) for name in ("adamw_torch_fused", "sgd", "adamw_8bit", "lomo")}
    assert known == {"adamw_torch_fused": 240, "sgd": 0, "adamw_8bit": 60, "lomo": None}
    assert optimizer_bytes("adamw_torch", [weight.half()]) == 120  # states have the parameters' dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_keys_and_values_are_exact(autocast: bool) -> None:
    """Under autocast keys are of 32 bit and values of 16, which an older cache keeps like keys."""
    model = tiny_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = model(input_ids=torch.arange(8, 20)[None], use_cache=True).past_key_values
    size = ModelSize.of(model.config)
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert size.kv_cache_bytes(12, 4, value_bytes(4, 2 if autocast else 4)) == tensor_bytes(tensors)


def test_parts_of_the_papers_run(large_run: dict) -> None:
    plan = predict(large_run, Machine(), Lengths())
    count = 2127532032
    assert part(plan, "student weights", "rollout") == 4 * count
    assert part(plan, "optimizer states", "rollout") == 8 * count
    assert part(plan, "gradients", "optimizer") == 4 * count
    assert part(plan, "gradients", "rollout") == 0
    assert part(plan, "teacher weights", "teacher") == 2 * 8767123696
    assert part(plan, "teacher hidden states") == 64 * 2048 * 2 * 4096 * 2
    assert part(plan, "rollout: keys and values", "rollout") == (4 + value_bytes(4, 2)) * 28 * 1024 * 64 * (1200 + 2048)
    assert plan.pass_tokens == 2 * (1000 + 2 * 200 + 2 * 2048)
    assert plan.teacher_pass_tokens == plan.pass_tokens == plan.batch_tokens // 32
    assert plan.shortest_pass == plan.pass_tokens // 2
    assert plan.peak == max(plan.total(phase) for phase in PHASES)


def test_shared_prompts_and_budgets_shorten_passes(large_run: dict) -> None:
    plan = predict(with_training(large_run, num_generations=2), Machine(), Lengths(response=500))
    assert plan.pass_tokens == 1000 + 2 * 200 + 2 * 2 * 500
    apart = predict(with_training(large_run, num_generations=2, share_prefix=False), Machine(), Lengths(response=500))
    assert apart.pass_tokens == 2 * (1000 + 2 * 200 + 2 * 500)
    bounded = predict(with_training(large_run, max_tokens_per_pass=6000), Machine(), Lengths(response=500))
    assert (bounded.pass_tokens, bounded.teacher_pass_tokens) == (2 * 2400, 6000)  # the teacher fills its passes
    plain = {"gamma": 0.0, "lam": 0.0, "eta": 1.0, "log_terms": False}
    one_view = predict(with_training(large_run, **plain), Machine(), Lengths(response=500))
    assert one_view.pass_tokens == 2 * (1000 + 200 + 500)


def test_a_pass_holds_what_the_trainer_asks_for(large_run: dict) -> None:
    """The longest prompt and response allowed, in both views, though the plan's own prompts are shorter."""
    allowed = with_training(large_run, max_prompt_length=16384, max_completion_length=2048)
    assert predict(allowed, Machine(), Lengths()).shortest_pass == 2 * (16384 + 2048)
    suggested = largest_pass(allowed, Machine(memory=2**38), Lengths())
    assert suggested >= 2 * (16384 + 2048)


def test_a_gradient_tolerance_takes_temporaries(large_run: dict) -> None:
    """For a block of 2,048 tokens 192 MiB, of magnitudes and copied rows; or more, for 8,192 columns at a time."""
    plain, tolerant = (
        predict(with_training(large_run, gradient_tolerance=x), Machine(), Lengths()) for x in (0.0, 1e-3)
    )
    name = "loss: gradient tolerance"
    assert part(plain, name) == 0 and 192 * 2**20 <= part(tolerant, name) <= 320 * 2**20
    assert tolerant.peak - plain.peak in (0, part(tolerant, name))


@pytest.mark.parametrize(
    ("training", "part_name", "phase"),
    [
        ({"teacher_offload": True}, "teacher weights", "student"),
        ({"gradient_checkpointing": True}, "activations", "student"),
        ({"freeze_vision": True}, "activations", "student"),
        ({"lam": 0.0}, "activations", "student"),
        ({"loss_workspace_bytes": 2**26}, "loss workspace", "teacher"),
        ({"optim": "adamw_8bit"}, "optimizer states", "rollout"),
        ({"max_tokens_per_pass": 3000}, "temporary buffers", "teacher"),
        ({"use_vllm": True}, "rollout: keys and values", "rollout"),
    ],
)
def test_settings_that_save_memory(large_run: dict, training: dict, part_name: str, phase: str) -> None:
    base = with_training(large_run, gradient_checkpointing=False)
    before, after = (predict(x, Machine(), Lengths()) for x in (base, with_training(base, **training)))
    assert part(after, part_name, phase) < part(before, part_name, phase)


def test_vllm_sleeps_outside_rollouts(large_run: dict) -> None:
    machine = Machine(memory=80 * GIB)
    awake = predict(with_training(large_run, use_vllm=True), machine, Lengths())
    asleep = predict(with_training(large_run, use_vllm=True, vllm_enable_sleep_mode=True), machine, Lengths())
    assert part(awake, "vLLM", "student") == part(asleep, "vLLM", "rollout") == 24 * GIB
    assert part(asleep, "vLLM", "student") == 0
    unknown = predict(with_training(large_run, use_vllm=True), Machine(), Lengths())
    assert any("vLLM's share" in note for note in unknown.notes)


def test_sharding(large_run: dict) -> None:
    whole, copied, sharded = (
        predict(large_run, machine, Lengths()) for machine in (Machine(), Machine(8), Machine(8, "fsdp2"))
    )
    for name in ("student weights", "gradients", "optimizer states"):
        assert part(sharded, name) == part(whole, name) / 8
    assert part(sharded, "teacher weights") == part(whole, "teacher weights")
    assert part(copied, "gradient buckets of DDP") == part(whole, "gradients")
    assert part(sharded, "gradient buckets of DDP") == 0


def test_advice_holds(large_run: dict) -> None:
    machine = Machine(8, memory=80 * GIB)
    assert predict(large_run, machine, Lengths()).peak > machine.memory
    alone, together = advise(large_run, machine, Lengths())
    assert "teacher_offload: true" in alone
    assert "gradient_checkpointing: true" not in [*alone, *together]  # it is on by default
    offloaded = predict(with_training(large_run, teacher_offload=True), machine, Lengths())
    assert offloaded.peak <= machine.memory
    assert together[-1] == "teacher_offload: true"

    small = Machine(8, memory=20 * GIB)
    alone, together = advise(large_run, small, Lengths())
    assert alone == []
    assert together == []


def test_no_setting_alone_but_some_together(large_run: dict) -> None:
    config = with_training(large_run, gradient_accumulation_steps=2, gradient_checkpointing=False)
    machine = Machine(8, memory=45 * GIB)
    alone, together = advise(config, machine, Lengths())
    assert alone == []
    assert len(together) > 1


def test_the_largest_pass_is_the_largest(large_run: dict) -> None:
    config = with_training(large_run, gradient_accumulation_steps=4, gradient_checkpointing=False)
    machine = Machine(memory=90 * GIB)
    tokens = largest_pass(config, machine, Lengths())
    assert tokens % PASS_MULTIPLE == 0

    def peak(tokens: int) -> int:
        return predict(with_training(config, max_tokens_per_pass=tokens), machine, Lengths()).peak

    assert peak(tokens) <= machine.memory < peak(tokens + PASS_MULTIPLE)
    assert largest_pass(config, Machine(memory=20 * GIB), Lengths()) is None


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"plan needs student\.path"):
        predict({"task": "digits"}, Machine(), Lengths())
    with pytest.raises(ValueError, match=r"gpus must be >= 1, got 0"):
        Machine(0)
    with pytest.raises(ValueError, match=r"sharding must be one of ddp, fsdp2, got 'tp'"):
        Machine(2, "tp")
