"""Evidence that is no picture: documents and tools' outputs, marked in a prompt or in a column of the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_checkpoints import REAL_FAMILIES
from tiny import tiny_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vgs import ConfigError, vgs_step
from vgs.data.checks import check_rows
from vgs.data.conversations import BadRow, read_evidence
from vgs.data.messages import remove_evidence
from vgs.data.prompts import encode_groups, unexpanded_ids
from vgs.data.sources import DataSource, load_samples
from vgs.evaluation.kl_gap import kl_gap
from vgs.models.families import placeholder_ids
from vgs_kernels import VGSObjective

DOCUMENT = {"type": "text", "text": "red is one , blue is two ", "evidence": True}
QUESTION = {"type": "text", "text": "what is red ?"}
#: Whatever else a template might do with the parts of a message, it would show a mark that it is given.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}{% for p in m.content %}"
    "{{ p.text }} {{ p.evidence }}{% endfor %}{% endif %}{% endfor %}answer :"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder, made = tmp_path_factory.mktemp("tokenizer"), tiny_tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_the_text_view_of_a_text_only_model_lacks_the_document(tokenizer: PreTrainedTokenizerBase) -> None:
    tool = [
        {"role": "user", "content": "what is red ?"},
        {"role": "system", "content": [{"type": "text", "text": "one two", "evidence": True}]},
    ]
    prompts = [user(DOCUMENT, QUESTION), user(QUESTION), tool, [{"role": "user", "content": "what is red ?"}]]
    samples = [{"prompt": prompt, "images": []} for prompt in prompts]
    groups = encode_groups(tokenizer, samples, [[[9]]] * 4, ())
    read = [[tokenizer.decode(x) for x in (group.prompt_ids, group.text_prompt_ids)] for group in groups]
    asked = "user what is red ? answer :"
    assert read[1] == read[3] == [asked, asked], "nothing is marked: both views are the same"
    known = tokenizer.decode(tokenizer("user red is one , blue is two what is red ? answer :")["input_ids"])
    assert read[0] == [known, asked]
    assert read[2] == ["user what is red ? system one two answer :", "user what is red ? system answer :"]
    assert all(group.images == {} for group in groups)
    assert unexpanded_ids(tokenizer, tool) == groups[2].prompt_ids.tolist()


@pytest.mark.parametrize("family", REAL_FAMILIES[:4])
def test_a_document_beside_a_picture(family: str, checkpoint: Callable[..., Any]) -> None:
    """Both are evidence; the text-only view is the question's alone."""
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    forbidden = placeholder_ids(AutoConfig.from_pretrained(checkpoint(family)))
    picture = [Image.new("RGB", (64, 48), "red")]
    place = {"type": "image"}
    samples = [
        {"prompt": user(place, DOCUMENT, QUESTION), "images": picture},
        {"prompt": user(DOCUMENT, QUESTION), "images": []},
        {"prompt": user(place, QUESTION), "images": picture},
        {"prompt": user(QUESTION), "images": []},
    ]
    both, document, image, neither = encode_groups(processor, samples, [[[9]]] * 4, forbidden)
    for group in (both, document, image):
        assert torch.equal(group.text_prompt_ids, neither.prompt_ids)
    assert both.has_images and image.has_images and not document.has_images and not neither.has_images
    assert len(both.prompt_ids) > len(image.prompt_ids) > len(neither.prompt_ids)
    assert len(document.prompt_ids) > len(neither.prompt_ids)
    assert len(both.prompt_ids) - len(image.prompt_ids) == len(document.prompt_ids) - len(neither.prompt_ids)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({**QUESTION, "evidence": "yes"}, "must be true or false, got 'yes'"),
        ({"type": "image", "image": Image.new("RGB", (8, 8)), "evidence": False}, "of an image must not be false"),
    ],
)
def test_marks_that_mean_nothing(tokenizer: PreTrainedTokenizerBase, part: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^sample 0: evidence .*{words}"):
        encode_groups(tokenizer, [{"prompt": user(part)}], [[[9]]], ())
    with pytest.raises(ValueError, match=words):
        remove_evidence(user(part))


def rows(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_column_of_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the question, behind pictures; <image> in a document is a word; a row may have none, or several."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = rows(
        tmp_path,
        {"question": "red ?", "answer": "a", "document": ["one <image>"], "images": ["a.png"]},
        {"question": "blue ?", "answer": "b", "document": ["two", "three"], "images": []},
        {"question": "what ?", "answer": "c", "document": None, "images": []},
    )
    samples = load_samples(DataSource(str(path), evidence_column="document"))
    marked = [{"type": "text", "text": f"{x}\n\n", "evidence": True} for x in ("one <image>", "two", "three")]
    asked = [{"type": "text", "text": x} for x in ("red ?", "blue ?")]
    assert samples[0]["prompt"] == user({"type": "image"}, marked[0], asked[0]) and len(samples[0]["images"]) == 1
    assert samples[1]["prompt"] == user(*marked[1:], asked[1])
    assert samples[2]["prompt"] == [{"role": "user", "content": "what ?"}]
    assert "document in 1 of 3 rows is null or empty: without pictures" in caplog.text and "(rows 2)" in caplog.text
    with pytest.raises(ConfigError, match="no column 'paper'"):
        load_samples(DataSource(str(path), evidence_column="paper"))
    bad = rows(tmp_path, {"question": "red ?", "answer": "a", "document": 3})
    found = check_rows(load_samples(DataSource(str(bad), images=None, evidence_column="document")), progress=False)
    assert [(x.column, x.sentence) for x in found] == [
        ("document", "'document' is 3, expected text or a list of texts")
    ]


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("[0.2, 0.7]", ["[0.2, 0.7]"]),
        ('[{"a": 1}]', ['[{"a": 1}]']),
        ('["one", 2]', ['["one", 2]']),
        ("[1] one two", ["[1] one two"]),
        ("[]", ["[]"]),
        ('["one", "", "two"]', ["one", "two"]),
        ('[" "]', []),
        ("  ", []),
        ("", []),
    ],
)
def test_a_document_may_look_like_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cell: str, texts: list[str]
) -> None:
    path = rows(tmp_path, {"question": "red ?", "answer": "a", "document": cell})
    samples = load_samples(DataSource(str(path), images=None, evidence_column="document"))
    content = samples[0]["prompt"][0]["content"]
    found = [] if isinstance(content, str) else [part["text"] for part in content if part.get("evidence")]
    assert found == [f"{text}\n\n" for text in texts]
    assert ("document in 1 of 1 rows is null or empty" in caplog.text) == (not texts)


@pytest.mark.parametrize("cell", [[], [""], None])
def test_lists_without_a_document(cell: list[str] | None) -> None:
    assert read_evidence(cell, "document") == []


def test_marks_in_messages_of_a_file(tmp_path: Path) -> None:
    """A table fills up what a part lacks; a mark within a text with places for pictures stays with its words."""
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    path = rows(tmp_path, {"messages": [system, *user({**DOCUMENT, "text": "one <image> two"}, QUESTION)]})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": ["a.png"], "answer": "a"}))
    prompt = load_samples(DataSource(str(path)))[0]["prompt"]
    assert [part.get("evidence") for part in prompt[1]["content"]] == [True, None, True, None]
    assert remove_evidence(prompt)[1] == user(QUESTION)[0]
    wrong = rows(tmp_path, {"messages": user({**DOCUMENT, "evidence": 3}, QUESTION), "answer": "a"})
    with pytest.raises(BadRow, match="evidence: 3, expected true or false"):
        load_samples(DataSource(str(wrong))).undecoded(0)


def text_model(seed: int, hidden: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"vocab_size": 40, "hidden_size": hidden, "intermediate_size": 48, "max_position_embeddings": 128}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, initializer_range=0.3)).eval()


def test_vgs_step_steers_a_text_only_student_towards_a_document(tokenizer: PreTrainedTokenizerBase) -> None:
    """Loss, terms and gradient by the paper's formula in float64 from plain forwards; a row without evidence has two
    equal views."""
    student, teacher = text_model(0).double(), text_model(1, 48).double()
    samples = [{"prompt": user(DOCUMENT, QUESTION), "images": []}, {"prompt": user(QUESTION), "images": []}]
    answers = [[20, 21, 1], [22, 1]]
    objective = VGSObjective(gamma=2.0, lam=0.5, eta=0.5, vds_quantile=0.5)
    output = vgs_step(student, teacher, tokenizer, samples, [[x] for x in answers], objective, backend="torch")

    def logps(model: nn.Module, prompt: list[dict[str, Any]], answer: list[int]) -> torch.Tensor:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        logits = model(torch.tensor([ids + answer])).logits[0]
        return logits[len(ids) - 1 : -1].log_softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    texts = (DOCUMENT["text"] + QUESTION["text"], QUESTION["text"])
    plain = [{"role": "user", "content": text} for text in texts]
    p, own, q, blind = (
        torch.cat([logps(model, [views[row]], answers[row]) for row in range(2)])
        for model in (student, teacher)
        for views in (plain, (plain[1], plain[1]))
    )
    target = (own + q - blind).log_softmax(-1).detach()
    vds = kl(q, blind)
    gate = vds > torch.quantile(vds, 0.5)
    weights = torch.tensor([1 / 6] * 3 + [1 / 4] * 2, dtype=torch.float64)
    values = kl(p, q.detach()) + 2.0 * kl(p, target) + 0.5 * gate * kl(own, blind.detach())
    loss = (0.5 * weights * values).sum()
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # token weights have float32
    torch.testing.assert_close(output.vds, vds.detach(), rtol=1e-7, atol=1e-12)
    assert (output.vds[:3] > 1e-3).all() and (output.vds[3:] == 0).all()
    named = dict(student.named_parameters())
    expected = torch.autograd.grad(loss, list(named.values()))
    output.loss.backward()
    for name, gradient in zip(named, expected, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(named[name].grad, gradient, rtol=0, atol=1e-6 * scale)


def test_the_gap_of_privileged_context_takes_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """It compares no text-only view, so that a mark changes nothing."""
    model = text_model(0)
    gaps = []
    for document in (DOCUMENT, {**DOCUMENT, "evidence": False}):
        sample = {"prompt": user(document, QUESTION), "images": [], "privileged_text": "red is one"}
        gaps.append(kl_gap(model, tokenizer, [sample], [[20, 21, 1]]))
    assert gaps[0] == gaps[1] and gaps[0]["gap"] > 0
