"""The step that all hosts share, without any of them: batches however cut, masks, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model, tiny_processor, tiny_samples
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vgs import ConfigError, encode_groups, placeholder_ids, vgs_step
from vgs.integrations.models import check_models
from vgs.integrations.options import HostOptions
from vgs.integrations.rows import host_row, words_alone
from vgs.integrations.signatures import check_signatures
from vgs.integrations.step import HostRows, HostStep, sums
from vgs.models.groups import PromptGroup
from vgs_kernels import VGSObjective

PROCESSOR, SAMPLES = tiny_processor(), tiny_samples(3)
RESPONSES = [[[20, 1], [20]], [[21, 22, 23, 1], []], [[24, 9], [25, 26, 1]]]
KNOBS = {"gamma": 1.5, "lam": 0.5, "eta": 0.7}
ADAPTIVE, OWN = {"schedule": "adaptive"}, {"vds_scope": "trajectory"}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_model(1, hidden=48).eval()


def rows_of(student: nn.Module) -> list[PromptGroup]:
    groups = encode_groups(PROCESSOR, SAMPLES, RESPONSES, placeholder_ids(student.config))
    return [single for group in groups for single in group.alone()]


def run(
    options: HostOptions, teacher: nn.Module, cuts: Sequence[Sequence[int]], live: list[Tensor] | None = None
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and summed terms of a batch that is cut into these passes."""
    student, step = tiny_model(0), HostStep(options)
    rows = rows_of(student)
    live = live or [torch.ones(len(row.responses[0]), dtype=torch.bool) for row in rows]
    batch = HostRows(rows, live, [number // 2 for number in range(len(rows))])
    scored = step.score_teacher(teacher, batch, cuts)
    items, total, terms = step.count(batch.lengths), 0.0, {}
    for chosen in cuts:
        loss, output = step.student_loss(student, scored, chosen, items)
        loss.backward()
        total += loss.item()
        for name, value in sums(output).items():
            terms[name] = terms.get(name, 0.0) + value
    return total, {name: p.grad for name, p in student.named_parameters()}, terms


@pytest.mark.parametrize("cuts", [[range(6)], [[0, 1], [2, 3], [4, 5]], [[4], [0], [3], [5], [2], [1]]])
@pytest.mark.parametrize(
    "options", [{"objective": {**KNOBS, **more}} for more in ({}, ADAPTIVE, OWN, {**OWN, **ADAPTIVE})]
)
def test_the_cut_changes_nothing(teacher: nn.Module, options: dict, cuts: list) -> None:
    student = tiny_model(0)
    objective = VGSObjective(**options["objective"])
    expected = vgs_step(student, teacher, PROCESSOR, SAMPLES, RESPONSES, objective)
    expected.loss.backward()
    loss, gradients, terms = run(HostOptions(**options), teacher, [list(cut) for cut in cuts])
    assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * scale, name
    assert terms["visual"].item() == pytest.approx(expected.visual.sum().item(), rel=1e-5)
    assert terms["gate"].item() == expected.gate.sum().item()


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_what_is_not_the_students_does_not_count(teacher: nn.Module, reduction: str) -> None:
    """A response whose last tokens are another's: as if it had been without them."""
    options = HostOptions(objective=KNOBS, loss_reduction=reduction)
    lengths = [len(x) for answers in RESPONSES for x in answers]
    live = [torch.arange(length) < max(length - 1, 1) for length in lengths]
    found = run(options, teacher, [[0, 1, 2], [3, 4, 5]], live)
    short = [[x[: max(len(x) - 1, 1)] for x in answers] for answers in RESPONSES]
    student = tiny_model(0)
    expected = vgs_step(student, teacher, PROCESSOR, SAMPLES, short, VGSObjective(**KNOBS), reduction=reduction)
    assert found[0] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_host_that_averages_passes_num_items(teacher: nn.Module) -> None:
    step, student = HostStep(HostOptions(objective=KNOBS)), tiny_model(0)
    rows = rows_of(student)
    live = [torch.ones(len(row.responses[0]), dtype=torch.bool) for row in rows]
    scored = step.score_teacher(teacher, HostRows(rows, live, list(range(6))), [list(range(6))])
    one, other = (step.student_loss(student, scored, [0, 4], items)[0].item() for items in (5, 2.5))
    assert other == pytest.approx(2 * one, rel=1e-6)


def test_a_sharded_teachers_head_is_gathered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passes the host cuts its batch into; and the scores are those of the whole model."""
    step, rows, cuts = HostStep(HostOptions(objective=KNOBS)), rows_of(tiny_model(0)), [[0], [1, 2], [3, 4, 5]]
    live = [torch.ones(len(row.responses[0]), dtype=torch.bool) for row in rows]
    batch = HostRows(rows, live, list(range(6)))
    plain, sharded = (tiny_model(1, hidden=48, tie=False).eval().requires_grad_(False) for _ in range(2))
    expected = step.score_teacher(plain, batch, cuts)
    gathered, full_tensor = [], DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda x, **given: gathered.append(x.shape) or full_tensor(x, **given))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for part in (*sharded.model.language_model.layers, sharded.lm_head, sharded):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        found = step.score_teacher(sharded, batch, cuts)
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters()), "nothing stays gathered"
    finally:
        dist.destroy_process_group()
    assert gathered == [expected.head.weight.shape]
    torch.testing.assert_close(found.limits, expected.limits)
    for one, other in zip(found.teacher, expected.teacher, strict=True):
        torch.testing.assert_close(one.vds, other.vds)
        torch.testing.assert_close(dict(one.rows), dict(other.rows))


def test_a_mask_of_another_length_is_named() -> None:
    rows = rows_of(tiny_model(0))
    with pytest.raises(ConfigError, match="row 0 has 2 response tokens, but a mask of 3"):
        HostRows(rows[:1], [torch.ones(3, dtype=torch.bool)], [0])


def test_an_image_token_in_a_response_is_named() -> None:
    student = tiny_model(0)
    row, image = rows_of(student)[0], student.config.image_token_id
    with pytest.raises(ConfigError, match=f"row 7: the response contains the image token {image}, expected none"):
        host_row(
            row.prompt_ids, row.text_prompt_ids, torch.tensor([image]), row.images, placeholder_ids(student.config),
            name="row 7",
        )  # fmt: skip


def test_models_are_asked_how_they_run(teacher: nn.Module) -> None:
    student = tiny_model(0)
    assert check_models(student, teacher, PROCESSOR, needs_images=True) == ["packed", "packed"]


def test_a_teacher_of_other_image_tokens_is_refused(teacher: nn.Module) -> None:
    other = tiny_model(1)
    other.config.image_token_id = 9
    with pytest.raises(ConfigError, match="the teacher has image and video token ids"):
        check_models(tiny_model(0), other, PROCESSOR, needs_images=True)


def test_a_tokenizer_alone_has_no_text_only_view(teacher: nn.Module) -> None:
    with pytest.raises(ConfigError, match="the student must be a vision-language model with a processor"):
        check_models(tiny_model(0), teacher, PROCESSOR.tokenizer, needs_images=True)


def test_a_method_with_other_parameters_is_named() -> None:
    def method(self: object, data: object) -> None: ...

    check_signatures("torch", "2", {method: "self, data"})
    with pytest.raises(ConfigError, match=r"method of torch .* has the parameters \(self, data\), but VGS knows"):
        check_signatures("torch", "2", {method: "self"})


def test_a_hosts_messages_without_their_evidence() -> None:
    """As swift has them: marks for pictures in texts, content parts that a table fills up, and ids of a response."""
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "red is one. ", "evidence": True},
        {"type": "text", "text": "<image>red ?", "evidence": None},
    ]
    tool = {"role": "tool", "content": [{"type": "text", "text": "two"}]}
    given = [{"role": "user", "content": parts}, tool, {"role": "assistant", "content": [20, 1]}]
    words = [{"role": "user", "content": [{"type": "text", "text": "red ?", "evidence": None}]}, *given[1:]]
    assert words_alone([{"role": "system", "content": "a<image>b"}, *given], "<image>") == [
        {"role": "system", "content": "ab"},
        *words,
    ]
    with pytest.raises(ConfigError, match="tool's message is marked as evidence"):
        words_alone([{"role": "tool", "content": parts[1:2]}], "<image>")
    with pytest.raises(ConfigError, match="must be true or false, got 3"):
        words_alone([{"role": "user", "content": [{**parts[1], "evidence": 3}]}], "<image>")
