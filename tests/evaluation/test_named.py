"""Scorers and rewards by name or ``module:function``, and rewards that know what the prompt has opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_processor

from vgs.data.answers import answers_match
from vgs.errors import ConfigError
from vgs.evaluation.rewards import (
    boxed_format,
    check_rewards,
    exact_match,
    find_scorer,
    named_rewards,
    prompt_opening,
    tagged_format,
    that_know_the_prompt,
)

MODULE = """
def starts(response, gold):
    return response.startswith(gold)

def length(completions, **columns):
    return [float(len(text)) for text in completions]

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the working directory."""
    name = f"my_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    return name


def test_scorers(module: str) -> None:
    assert find_scorer(None) is find_scorer("answers_match") is answers_match
    same, own = find_scorer("same_text"), find_scorer(f"{module}:starts")
    assert same("\\boxed{Red  Car}", "red car") and not same("0.5", "1/2")
    assert own("abc", "ab") and not own("abc", "b") and own("abc", ["b", "a"])


def test_rewards(module: str) -> None:
    check_rewards(["format", f"{module}:length"])
    first, second = named_rewards(["exact_match", f"{module}:length"])
    assert first is exact_match and second(completions=["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answer_match", "scorer has the unknown name 'answer_match'. Did you mean 'answers_match'"),
        ("zzz", "Expected one of answers_match, same_text. A function of yours is module:function"),
        ("nowhere:f", r"scorer 'nowhere:f': the module 'nowhere' cannot be imported \(No module named 'nowhere'\)"),
        ("broken_module:f", "the module 'broken_module' cannot be imported .*nothing_of_this_name"),
        ("{}:nothing", "has no function 'nothing'"),
        ("{}:number", "has no function 'number'"),
        (":f", "the module '' cannot be imported"),
    ],
)
def test_names_that_lead_nowhere(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_scorer(name.format(module))


def opening(tail: str) -> str:
    processor = tiny_processor()
    processor.chat_template += "{% if add_generation_prompt %}{{ '" + tail + "' }}{% endif %}"
    return prompt_opening(processor)


def test_what_a_prompt_opens() -> None:
    assert prompt_opening(tiny_processor()) == opening("answer") == ""
    assert opening("<think>\\n") == "<think>\n" and opening("<reason>") == "<reason>"
    assert opening("<think>\\n\\n</think>\\n\\n") == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("opened", "response", "reward"),
    [
        ("<think>\n", "two squares</think>\\boxed{2}", 1.0),
        ("<think>\n", "<think>two squares</think>\\boxed{2}", 0.0),  # opened twice
        ("<think>\n", "two squares \\boxed{2}", 0.0),
        ("<think>\n\n</think>\n\n", "so \\boxed{2}", 1.0),
        ("<think>\n\n</think>\n\n", "<think>two squares</think>\\boxed{2}", 1.0),
        ("<think>\n\n</think>\n\n", "so 2", 0.0),
        ("", "two squares</think>\\boxed{2}", 0.0),
        ("", "<think>two squares</think>\\boxed{2}", 1.0),
    ],
)
def test_the_format_goes_on_where_the_prompt_ends(opened: str, response: str, reward: float) -> None:
    assert boxed_format([response], opened=opened) == [reward]
    tagged = response.replace("\\boxed{2}", "<answer>2</answer>").replace("so <", "<")
    assert tagged_format([tagged], opened=opened) == [reward]


def test_rewards_that_know_the_prompt() -> None:
    processor = tiny_processor()
    rewards = [boxed_format, exact_match]
    assert that_know_the_prompt(rewards, processor) == rewards
    processor.chat_template += "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    knowing, plain = that_know_the_prompt(rewards, processor)
    assert knowing(["x</think>\\boxed{1}"]) == [1.0] and plain is exact_match
