"""What is sent and kept is what was there, bit by bit, for every family's image fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from covering import slow_beyond
from real_checkpoints import FIELD_FAMILIES, REAL_FAMILIES, photo_samples
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs.data.prompts import encode_groups
from vgs.models.families import placeholder_ids
from vgs.models.heads import Head
from vgs.teachers.fingerprints import head_fingerprint, prompt_fingerprint, weights_fingerprint
from vgs.teachers.local import LocalTeacher
from vgs.teachers.server import ServedModel
from vgs.teachers.wire import pack_groups, pack_head, unpack, unpack_groups, unpack_head

USUAL = ("gemma4",)
FAMILIES = slow_beyond(USUAL, (*REAL_FAMILIES, *FIELD_FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_says_what_the_model_says(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(family, teacher=True)
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa").eval()
    forbidden = placeholder_ids(model.config)
    samples = photo_samples(tmp_path)
    words = [token for token in range(40, 60) if token not in forbidden]
    responses = [[words[:3], words[3:4]], [words[5:9]], [[]]]
    try:
        groups = encode_groups(AutoProcessor.from_pretrained(path), samples, responses, forbidden)
    except ValueError:  # a family of one picture a prompt
        groups = encode_groups(AutoProcessor.from_pretrained(path), samples[::2], responses[::2], forbidden)
    notes = {"text": True, "share_prefix": True, "kernel": "auto", "autocast": "none"}
    body = pack_groups(groups, **notes)
    received, found = unpack_groups(body, model.config.get_text_config().vocab_size, torch.device("cpu"))
    assert found == {"groups": len(groups), **notes}
    for group, other in zip(groups, received, strict=True):
        assert prompt_fingerprint(group) == prompt_fingerprint(other)
        assert [x.tolist() for x in group.responses] == [x.tolist() for x in other.responses]
    expected = LocalTeacher(model).states(groups, True, lambda rows: dict(zip(("image", "text"), rows, strict=True)))
    rows, _ = unpack(ServedModel(model, None, "it").states(body))
    for view in ("image", "text"):
        assert torch.equal(rows[view], expected[view]), view


def test_a_fingerprint_sees_every_bit() -> None:
    layer = torch.nn.Linear(4, 3)
    before = weights_fingerprint(layer)
    assert before == weights_fingerprint(layer) and len(before) == 64
    with torch.no_grad():
        layer.weight[2, 3] = torch.nextafter(layer.weight[2, 3], torch.tensor(9.0))
    assert weights_fingerprint(layer) != before
    assert weights_fingerprint(layer.bfloat16()) not in (before, weights_fingerprint(layer.float()), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_arrives_whole(dtype: torch.dtype, bias: bool) -> None:
    head = Head(torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype) if bias else None, 0.25, 30.0)
    found = unpack_head(pack_head(head))
    assert head_fingerprint(found) == head_fingerprint(head)
    assert (found.weight.dtype, found.logit_scale, found.softcap) == (dtype, 0.25, 30.0)
    for change in ({"logit_scale": 0.5}, {"softcap": None}, {"bias": torch.zeros(5)}):
        assert head_fingerprint(Head(**{**vars(head), **change})) != head_fingerprint(head)
