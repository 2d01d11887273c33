"""The parts of VGS in verl: what it registers, what it refuses, rows that share a prompt, and the text-only prompt."""

from __future__ import annotations

import asyncio
import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ["VERL_ENGINE_VENDOR"] = "vgs"  # before verl loads its plugins

import cpu_platform  # noqa: F401  (chooses the platform)
from tensordict import TensorDict
from tiny import tiny_image
from transformers import AutoModelForImageTextToText, AutoProcessor
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl_batches import columns, rows_of, save_models

from vgs import ConfigError
from vgs.integrations.rows import merge_rows
from vgs.integrations.verl import patches
from vgs.integrations.verl.agent_loop import VGSAgentLoop
from vgs.integrations.verl.batches import read_rows
from vgs.integrations.verl.engine import VGSEngine
from vgs.models.families import placeholder_ids


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def student(models: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(models / "student")


def batch_of(models: Path, student: Any, **changes: Any) -> tuple[TensorDict, list[Any]]:
    rows, masks = rows_of(models, student)
    found = {**columns(rows, masks, list(range(8))), **changes}
    nested = {
        key: torch.nested.as_nested_tensor(value, layout=torch.jagged) if isinstance(value[0], torch.Tensor) else value
        for key, value in found.items()
        if value is not None
    }
    return tu.get_tensordict(nested, {"temperature": 1.0}), rows


# ---- registration


def test_installing_is_all_that_verl_needs() -> None:
    (point,) = entry_points(group="verl.plugins", name="vgs")
    assert point.load().VENDOR == "vgs"


@pytest.mark.parametrize("backend", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("device", ["cuda", "npu", "cpu"])
def test_the_vendor_chooses_the_engine(monkeypatch: pytest.MonkeyPatch, backend: str, device: str) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
    assert EngineRegistry.get_engine_cls("language_model", backend) is VGSEngine


def test_a_critic_keeps_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is not VGSEngine


def test_without_the_vendor_verl_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is not VGSEngine


def test_the_agent_loop_is_registered() -> None:
    target = _agent_loop_registry["vgs_single_turn"]["_target_"]
    assert target == "vgs.integrations.verl.agent_loop.VGSAgentLoop"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strategy": "fsdp"}, "actor.strategy must be 'fsdp2' with VGS, got 'fsdp'."),
        ({"offload_policy": True}, "actor.fsdp_config.offload_policy must be False with VGS"),
        ({"ranks": 2}, "actor.ulysses_sequence_parallel_size must be 1 with VGS, got 2"),
        ({"options": {"techer": "x"}}, "VGS_OPTIONS has the option 'techer'; expected some of teacher, objective"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setenv("VGS_OPTIONS", json.dumps(settings.get("options", {"teacher": "x"})))

    def init(self: Any) -> None:
        known = {"strategy": "fsdp2", "offload_policy": False, **settings}
        self.engine_config = SimpleNamespace(forward_only=False, **known)
        self.ulysses_sequence_parallel_size = settings.get("ranks", 1)

    monkeypatch.setattr(VGSEngine.__mro__[1], "__init__", init)
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        VGSEngine()


# ---- rows


def test_rows_are_what_the_trainer_encoded(models: Path, student: Any) -> None:
    batch, expected = batch_of(models, student)
    found = read_rows(batch, student, placeholder_ids(student.config))
    assert found.names[:3] == ["prompt 0", "prompt 0", "prompt 1"]
    for row, other in zip(found.rows, expected, strict=True):
        assert row.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert row.text_prompt_ids.tolist() == other.text_prompt_ids.tolist()
        assert row.responses[0].tolist() == other.responses[0].tolist()
        images = {k: v for k, v in other.images.items() if other.has_images}
        assert row.images.keys() == images.keys()
        assert all(torch.equal(row.images[name], value) for name, value in images.items())
    assert [int(mask.sum()) for mask in found.live] == [2, 3, 2, 1, 2, 1, 3, 4]


def test_the_older_trainers_columns_are_read_too(models: Path, student: Any) -> None:
    rows, _ = rows_of(models, student)
    texts = [row.text_prompt_ids.tolist() for row in rows]
    batch, _ = batch_of(models, student, extra_fields=None, text_prompt_ids=texts)
    found = read_rows(batch, student, placeholder_ids(student.config))
    assert [row.text_prompt_ids.tolist() for row in found.rows] == texts


def test_rows_of_one_prompt_share_it(models: Path, student: Any) -> None:
    batch, _ = batch_of(models, student)
    found = read_rows(batch, student, placeholder_ids(student.config))
    groups, order = merge_rows(found.rows, found.names)
    assert [len(group.responses) for group in groups] == [2, 2, 2, 2] and order == list(range(8))
    groups, order = merge_rows([found.rows[i] for i in (0, 2, 1)], ["a", "b", "a"])
    assert [len(group.responses) for group in groups] == [2, 1] and order == [0, 2, 1]


def test_rows_whose_pixels_differ_stay_apart(models: Path, student: Any) -> None:
    batch, _ = batch_of(models, student)
    found = read_rows(batch, student, placeholder_ids(student.config))
    one, other = found.rows[0], found.rows[1]
    other.images["pixel_values"] = other.images["pixel_values"].clone()
    other.images["pixel_values"][0, 0] += 1e-3
    groups, _ = merge_rows([one, other], ["a", "a"])
    assert len(groups) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"extra_fields": [{}] * 8}, "row 0 has images, but no text_prompt_ids: set rollout.agent"),
        ({"multi_modal_inputs": [None] * 8}, "row 0: the prompt contains image tokens, but the host sent no pixels"),
        (
            {"multi_modal_inputs": [{"pixel_values_videos": torch.zeros(4, 3)}] * 8},
            "row 0 has the field 'pixel_values_videos'; only images are scored",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_named(
    models: Path, student: Any, changes: dict[str, Any], sentence: str
) -> None:
    batch, _ = batch_of(models, student, **changes)
    with pytest.raises(ConfigError, match=sentence):
        read_rows(batch, student, placeholder_ids(student.config))


# ---- the text-only prompt


def test_the_agent_loop_renders_the_prompt_without_its_images(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own continuous-token builder with the real processor; only the server is ours."""
    from verl.experimental.agent_loop.agent_loop import create_continuous_token_builder
    from verl.workers.rollout.replica import TokenOutput

    processor = AutoProcessor.from_pretrained(models / "student")
    image, image_token = tiny_image(0), processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    async def generate(**options: Any) -> TokenOutput:
        assert options["image_data"] == [image]
        assert options["sampling_params"]["logit_bias"][image_token] == -100
        assert options["sampling_params"]["temperature"] == 0.7
        return TokenOutput(token_ids=[20, 1])

    async def of_messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {"images": [image]}

    async def turn() -> Any:
        loop = object.__new__(VGSAgentLoop)
        loop.rollout_config = SimpleNamespace(prompt_length=64, response_length=8)
        loop.prompt_length, loop.response_length = 64, 8
        loop.tokenizer, loop.processor, loop.mm_processor_kwargs = processor.tokenizer, processor, {}
        loop.server_manager, loop.loop = SimpleNamespace(generate=generate), asyncio.get_running_loop()
        loop.continuous_token_builder = create_continuous_token_builder(
            processor.tokenizer,
            hf_model_type=None,  # the one for all families: Qwen's wants a newline of one token
            chat_template_kwargs={},
            mm_processor_kwargs={},
            processor=processor,
        )
        monkeypatch.setattr(SingleTurnAgentLoop, "process_multi_modal_info", lambda self, x: of_messages(x))
        content = [{"type": "image", "image": image}, {"type": "text", "text": "red ?"}]
        return await loop.run({"temperature": 0.7}, raw_prompt=[{"role": "user", "content": content}])

    output = asyncio.run(turn())
    words = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "red ?"}]}], add_generation_prompt=True, tokenize=True
    )
    ids = words["input_ids"] if hasattr(words, "keys") else words
    assert output.extra_fields["text_prompt_ids"] == torch.as_tensor(ids).flatten().tolist()
    assert image_token in output.prompt_ids and image_token not in output.extra_fields["text_prompt_ids"]


# ---- verl's own forwards


def test_ours_run_with_the_librarys_methods(models: Path, student: Any) -> None:
    patches.remember(student.config)
    assert not patches.replaced()
    own = type(student.model).forward
    apply_monkey_patch(student, use_remove_padding=False, ulysses_sp_size=1, use_fused_kernels=False)
    theirs = type(student.model).forward
    assert theirs is not own and not patches.in_layers()
    methods = patches.current()
    with patches.library_methods():
        assert type(student.model).forward is own
        with patches.verl_methods(methods):
            assert type(student.model).forward is theirs
        assert type(student.model).forward is own
    assert type(student.model).forward is theirs
