"""The examples with loops of their own: what they train, compute and report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example_runs import STUDENT, Recorder, fresh, one_step, run_example
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from vgs import describe_responses, respond, vgs_step
from vgs.data.prompts import encode_prompts
from vgs.models.families import placeholder_ids
from vgs_kernels import VGSObjective

SHORT = ["--steps", "2", "--batch_size", "4", "--max_new_tokens", "5"]


def test_a_bare_loop(inside: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    names = run_example("bare_loop.py", *SHORT, "--learning_rate", "0.05")
    losses, weights = one_step([recorder.joined(0, 1), recorder.joined(1, 1)], 0.05, clip=1.0)
    assert recorder.losses == pytest.approx(losses, rel=1e-5)
    saved = fresh("runs/bare_loop").state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    assert all(x.grad is None for x in names["teacher"].parameters())


def test_lora_moves_the_addition_alone(inside: Path, recorder: Recorder) -> None:
    student = run_example("lora.py", *SHORT)["student"]
    before = fresh().state_dict()
    kept = {name.replace(".base_layer", ""): x for name, x in student.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    adapters = {name: x for name, x in student.named_parameters() if "lora_B" in name}
    assert len(adapters) == 14 and all(x.any() for x in adapters.values()), "they start at zero"
    assert not any("visual" in name for name in adapters)
    files = {path.name for path in (inside / "runs/lora").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def test_logits_in_hand_give_the_loss_of_the_step(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded forwards of the models themselves, and another kernel, beside packed rows."""
    names = run_example("logits_in_hand.py", "--steps", "1", "--batch_size", "4", "--max_new_tokens", "5")
    responses = [[x.tolist()] for x in names["answers"]]
    teacher = names["teacher"]
    expected = vgs_step(fresh(), teacher, names["processor"], names["samples"], responses, VGSObjective())
    assert names["output"].loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for name in ("standard", "visual", "language", "vds", "entropy", "student_vds"):
        torch.testing.assert_close(getattr(names["output"], name), getattr(expected, name), rtol=1e-3, atol=1e-5)


def test_metrics_are_those_of_plain_forwards(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_example("metrics.py", "--samples", "3", "--max_new_tokens", "6")
    model, processor, sample = names["model"], names["processor"], names["sample"]
    ids, terms = torch.tensor(names["responses"][0][0]), names["terms"]

    def logps(images: list[Image.Image]) -> Tensor:
        prompt, _, fields = encode_prompts(processor, [{**sample, "images": images}])
        fields = {k: torch.nn.functional.pad(x, (0, len(ids))) if "type" in k else x for k, x in fields.items()}
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids[None]], 1), **fields).logits
        return logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)

    p, blind = logps(sample["images"]), logps([])
    expected = {
        "logps": p.gather(1, ids[:, None])[:, 0],
        "entropy": -(p.exp() * p).sum(1),
        "vds": (p.exp() * (p - blind)).sum(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-4, atol=1e-5, msg=lambda m, k=name: f"{k}: {m}")
    assert expected["vds"].max() > 0.01
    assert terms["token_ids"].tolist() == ids.tolist()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and last.startswith("mean of 3 answers, nats per token: vds ")


# ---- the helpers that they need


def test_responses_and_their_description_are_in_the_order_of_samples(inside: Path) -> None:
    model, processor = fresh().eval(), AutoProcessor.from_pretrained(STUDENT)
    pictures = [Image.open(f"photos/photo_{i}.jpg").convert("RGB") for i in range(2)]
    samples = [{"prompt": [{"role": "user", "content": "seven ?"}], "images": [x]} for x in pictures]
    torch.manual_seed(0)
    responses = respond(model.train(), processor, samples, num_generations=3, batch_size=4, max_new_tokens=6)
    assert model.training
    assert [len(x) for x in responses] == [3, 3] and all(1 <= len(x) <= 6 for answers in responses for x in answers)
    assert len({tuple(x) for answers in responses for x in answers}) > 1, "responses are sampled"
    forbidden = set(placeholder_ids(model.config))
    assert not forbidden & {token for answers in responses for x in answers for token in x}
    greedy = respond(model, processor, samples, num_generations=2, greedy=True, max_new_tokens=6)
    assert all(one == other for one, other in greedy)
    model.eval()
    described = describe_responses(model, processor, samples, responses)
    for sample, answers, found in zip(samples, responses, described, strict=True):
        assert [x["token_ids"].tolist() for x in found] == answers
        (alone,) = describe_responses(model, processor, [sample], [answers])
        for one, other in zip(found, alone, strict=True):
            assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in ("vds", "logps"))


def test_mistakes_are_named(inside: Path) -> None:
    model, processor = fresh(), AutoProcessor.from_pretrained(STUDENT)
    sample = {"prompt": [{"role": "user", "content": "seven ?"}], "images": []}
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        respond(model, processor, [sample], num_generations=0)
    with pytest.raises(ValueError, match="responses holds entries for 2 samples, expected 1"):
        describe_responses(model, processor, [sample], [[[9]], [[9]]])
    with pytest.raises(TypeError, match=r"responses\[0\] must be a list of responses"):
        describe_responses(model, processor, [sample], [[9]])
