"""Rewards: what they give for right, wrong and unreadable responses, and what is refused at start-up."""

from __future__ import annotations

import pytest
from trl.trainer.utils import get_callable_name

from vgs.evaluation import rewards
from vgs.evaluation.rewards import (
    REWARDS,
    boxed_format,
    check_rewards,
    choice,
    exact_match,
    named_rewards,
    tagged_format,
)

REASONED = "<reason>two digits</reason>"


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("form", [str, chat])
def test_exact_match_compares_final_answers(form) -> None:
    texts = ["so \\boxed{4}", "<answer>5</answer>", "<reason>4</reason> 3", "\\boxed{4}"]
    assert exact_match([form(text) for text in texts], answer=["4", "5.0", "4", None]) == [1.0, 1.0, 0.0, None]


def test_gold_answers_are_read_from_either_column() -> None:
    assert exact_match(["a"], solution=["a"]) == exact_match(["a"], answer=["a"]) == [1.0]
    assert exact_match(["a"], answer=["a"], solution=["b"]) == [1.0]


def test_the_scorer_replaces_the_comparison() -> None:
    (reward,) = named_rewards(["exact_match"], scorer=lambda text, gold: text.startswith(gold))
    assert reward(completions=["abc", "bc"], answer=["a", "a"], trainer_state=None) == [1.0, 0.0]
    assert get_callable_name(reward) == "exact_match"


def test_a_choice_is_its_letter_and_nothing_else_is_a_choice() -> None:
    texts = ["\\boxed{\\text{B}}", "the answer is (B)", "B. 42", "\\boxed{C}", "42", "\\boxed{B}"]
    assert choice(texts, answer=["B", "(B)", "B. 42", "B", "B", "42"]) == [1.0, 1.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "boxed", "tagged"),
    [
        (f"{REASONED} the answer is \\boxed{{4}}.", 1, 0),
        (f"\n{REASONED}\n\\boxed{{\\frac{{1}}{{2}}}}", 1, 0),
        ("<think>x</think>\\boxed{4}", 1, 0),
        (f"{REASONED} <answer>4</answer>\n", 0, 1),
        (f"{REASONED} so <answer>4</answer>", 0, 0),
        (f"{REASONED} <answer>4</answer> <answer>5</answer>", 0, 0),
        (f"{REASONED} <answer></answer>", 0, 0),
        (f"{REASONED} \\boxed{{4}} \\boxed{{5}}", 0, 0),
        (f"{REASONED} \\boxed{{}}", 0, 0),
        (f"{REASONED} \\boxed{{4", 0, 0),
        (f"{REASONED} {REASONED} \\boxed{{4}}", 0, 0),
        ("<reason>never ends \\boxed{4}", 0, 0),
        ("<reason>wrong end</think> \\boxed{4}", 0, 0),
        (f"first {REASONED} \\boxed{{4}}", 0, 0),
        ("\\boxed{4}", 0, 0),
        ("", 0, 0),
    ],
)
def test_formats(text: str, boxed: int, tagged: int) -> None:
    assert boxed_format([chat(text)], answer=["4"]) == [boxed]
    assert tagged_format([text]) == [tagged]


def test_mathematics_is_compared_as_such() -> None:
    texts = ["\\boxed{\\frac{2}{4}}", "<answer>1/2</answer>", "\\boxed{x^2+1}", "\\boxed{0.4}", "none", "\\boxed{3}"]
    gold = ["0.5", "\\frac{1}{2}", "$1+x^2$", "1/2", "1/2", None]
    assert rewards.math_verify([chat(text) for text in texts], answer=gold) == [1.0, 1.0, 1.0, 0.0, 0.0, None]
    assert named_rewards(["math_verify"]) == [rewards.math_verify]


def test_a_missing_package_is_named_at_start_up(monkeypatch) -> None:
    monkeypatch.setattr(rewards, "is_math_verify_available", lambda: False)
    with pytest.raises(ValueError, match="pip install math-verify"):
        check_rewards(["exact_match", "math_verify"])
    check_rewards([name for name in REWARDS if name != "math_verify"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "list of names"),
        ("format", "list of names"),
        (["exactmatch"], "Did you mean 'exact_match'"),
        (["zzz"], "one of exact_match, choice"),
        (["format", "format"], "'format' 2 times"),
    ],
)
def test_refused_names(names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rewards(names)


@pytest.mark.parametrize("reward", [exact_match, choice])
def test_missing_gold_answers_are_named(reward) -> None:
    with pytest.raises(ValueError, match="column 'answer' or 'solution'"):
        reward(["a"])
    with pytest.raises(ValueError, match="2 gold answers for 1 completions"):
        reward(["a"], answer=["a", "b"])


@pytest.mark.parametrize("name", ["exact_match", "choice", "math_verify"])
def test_alternatives_and_missing_gold_answers(name: str) -> None:
    """Any of several answers is right; no answer is no reward."""
    gold = [["A", "B"], ["A", "B"], None, []] if name == "choice" else [["1/2", "7"], ["1/2", "7"], None]
    texts = (
        ["\\boxed{B}", "\\boxed{C}", "\\boxed{B}", "None"] if name == "choice" else ["\\boxed{7}", "\\boxed{8}", "None"]
    )
    expected = [1.0, 0.0, None, None] if name == "choice" else [1.0, 0.0, None]
    assert REWARDS[name]([chat(text) for text in texts], answer=gold) == expected
