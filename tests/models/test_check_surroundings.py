"""The check at the start of a run says the same wherever it is asked: settings of the caller, full memory, no disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from families import FAMILIES
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP

from vgs.disk import remembered
from vgs.models import agreement, self_check
from vgs.models.self_check import check_groups, examine, verdict

CPU = torch.device("cpu")
FAMILY = FAMILIES["qwen2_5_vl"]
PARTS = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)


@pytest.fixture
def precisions() -> Iterator[None]:
    before = [part.fp32_precision for part in PARTS]
    yield
    for part, precision in zip(PARTS, before, strict=True):
        part.fp32_precision = precision


@pytest.mark.usefixtures("precisions")
def test_settings_of_tf32_are_no_obstacle_and_stay() -> None:
    torch.backends.fp32_precision = "tf32"  # what ``TrainingArguments(tf32=True)`` does
    before = [part.fp32_precision for part in PARTS]
    assert "tf32" in before[1:]
    model = FAMILY.build()
    found = examine(type(model), model.config, check_groups(FAMILY.groups()), CPU)
    assert found.way == "packed", str(found)
    assert [part.fp32_precision for part in PARTS] == before


def test_inference_mode_is_no_obstacle() -> None:
    model = FAMILY.build()
    with torch.inference_mode():
        found = examine(type(model), model.config, check_groups(FAMILY.groups()), CPU)
    assert found.way == "packed", str(found)


def test_memory_that_is_full_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run may find it free."""
    model, ways = FAMILY.build(), dict(agreement.WAYS)
    monkeypatch.setattr(self_check, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_KNOWN", {})

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setitem(agreement.WAYS, "packed", full)
        assert verdict(type(model), model.config, FAMILY.groups(), CPU).way == "padded"
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "_KNOWN", {})
        patch.setattr(self_check, "shallow_copy", full)
        assert "OutOfMemoryError" in verdict(type(model), model.config, FAMILY.groups(), CPU).error
    monkeypatch.setattr(self_check, "_KNOWN", {})
    assert ways == agreement.WAYS
    assert verdict(type(model), model.config, FAMILY.groups(), CPU).way == "packed"


def test_a_patched_class_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in others: the config and the model's own class are what they were."""
    family = FAMILIES["qwen3_vl"]
    model, original = family.build(), Qwen3VLTextMLP.forward
    monkeypatch.setattr(self_check, "HF_HOME", str(tmp_path))
    assert verdict(type(model), model.config, family.groups(), CPU).way == "packed"

    def over_the_row(self: nn.Module, x: Tensor) -> Tensor:
        return original(self, x) + x.cumsum(dim=1)

    monkeypatch.setattr(Qwen3VLTextMLP, "forward", over_the_row)
    found = verdict(type(model), model.config, family.groups(), CPU)
    assert found.way == "padded" and "mlp (Qwen3VLTextMLP)" in found.ways["packed"].where


def test_processes_answer_alike_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each has in its batch, and if one of them has a full device."""
    model, groups = FAMILY.build(), FAMILY.groups()
    monkeypatch.setattr(self_check, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: pytest.fail("the other has no question"))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(self_check, "_KNOWN", {})
            patch.setattr(self_check, "examine", lambda *_: self_check.Verdict({}, 0.0, "OutOfMemoryError: full"))
            first = verdict(type(model), model.config, groups, CPU)
        monkeypatch.setattr(self_check, "_KNOWN", {})  # the other process
        assert verdict(type(model), model.config, groups, CPU) == first
        assert verdict(type(model), model.config, groups[1:2], CPU) == first, "has images among its fields"
    finally:
        dist.destroy_process_group()
    monkeypatch.setattr(self_check, "_KNOWN", {})
    assert verdict(type(model), model.config, groups, CPU).way == "packed"


def test_a_folder_that_cannot_be_looked_into_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert remembered(tmp_path / "file" / "vgs" / "check.json", lambda: {"a": 1}) == {"a": 1}
