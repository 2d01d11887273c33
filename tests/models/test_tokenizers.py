"""Comparison of tokenizers, and where training stops because of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tiny import SPECIAL, WORDS, save_tiny_checkpoint, tiny_model, tiny_processor, tiny_tokenizer, trainer_options

from vgs.cli import main as cli
from vgs.models.tokenizers import check_same_tokens, load_tokenizer

FIRST = len(SPECIAL)


def test_same_tokens() -> None:
    check_same_tokens(tiny_tokenizer(), tiny_tokenizer())
    check_same_tokens(tiny_processor(), tiny_tokenizer())


def test_ids_with_different_strings_are_named() -> None:
    swapped = ["user", "system", *WORDS[2:]]
    message = rf"2 ids differ .*: {FIRST} is 'system' and 'user', {FIRST + 1} is 'user' and 'system'\."
    with pytest.raises(ValueError, match=message):
        check_same_tokens(tiny_tokenizer(), tiny_tokenizer(swapped))
    check_same_tokens(tiny_tokenizer(), tiny_tokenizer(swapped), vocab_size=FIRST)


def test_only_the_first_few_are_named() -> None:
    with pytest.raises(ValueError, match=f"{len(WORDS)} ids differ") as caught:
        check_same_tokens(tiny_tokenizer(), tiny_tokenizer([f"x{word}" for word in WORDS]))
    assert str(caught.value).count(" is ") == 3


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_ids_that_one_of_them_has(longer: str) -> None:
    pair = {"student": tiny_tokenizer(), "teacher": tiny_tokenizer()}
    pair[longer].add_tokens(["<reason>"])
    end = FIRST + len(WORDS)
    with pytest.raises(ValueError, match=rf"only the {longer} has 1 of them: {end} '<reason>'. Set vocab_size to"):
        check_same_tokens(**pair)
    check_same_tokens(**pair, vocab_size=end)


def test_special_tokens() -> None:
    other = tiny_tokenizer()
    other.eos_token = "a"
    with pytest.raises(ValueError, match=r"the same eos_token, got '.*' and 'a'"):
        check_same_tokens(tiny_tokenizer(), other)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "whole")
    assert load_tokenizer({"path": str(tmp_path / "whole")}).get_vocab() == tiny_tokenizer().get_vocab()
    tiny_model().save_pretrained(tmp_path / "weights")
    assert load_tokenizer({"path": str(tmp_path / "weights")}) is None


def test_training_stops_before_data_and_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("student", "teacher"):
        save_tiny_checkpoint(tmp_path / role)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    longer = tiny_tokenizer()
    longer.add_tokens(["<reason>"])
    longer.save_pretrained(tmp_path / "teacher")
    config = {
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"train": {"path": "no data here"}},
        "training": trainer_options(tmp_path / "run"),
    }
    with pytest.raises(ValueError, match=r"only the teacher has 1 of them: \d+ '<reason>'"):
        cli.train(config)
