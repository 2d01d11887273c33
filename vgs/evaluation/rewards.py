"""Verifiable rewards in TRL's signature: ``reward(completions, answer=..., **columns) -> list[float | None]``.

A completion is a string, or a conversation whose last message is the response. The gold answers are the data's column
``answer``, or TRL's name for it, ``solution``; a reward that needs them raises a ``ConfigError`` where neither is there
or their number differs. ``None`` means that a reward does not apply to a sample.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from trl.import_utils import is_math_verify_available
from trl.rewards import accuracy_reward

from ..data.answers import alternatives, answers_match, choice_letter, final_answer, last_boxed
from ..errors import ConfigError, in_one_line

Reward = Callable[..., list[float | None]]
Completion = str | list[dict[str, Any]]

REASONING = re.compile(r"\s*<(reason|think)>(.*?)</\1>(.*)", flags=re.DOTALL)
OPENED = re.compile(r"<(reason|think)>\s*(</\1>\s*)?$")  # at the end of a prompt
TAGGED = re.compile(r"\s*<answer>(?:(?!</?answer>).)+</answer>\s*", flags=re.DOTALL)


def response_text(completion: Completion) -> str:
    """The text of a completion, as TRL hands it to a reward."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _gold(
    reward: str, completions: Sequence[Completion], answer: Sequence[str | None] | None, solution: Any
) -> Sequence[str | None]:
    gold = solution if answer is None else answer
    if gold is None:
        raise ConfigError(f"The reward {reward} needs a column 'answer' or 'solution' with the gold answers.")
    if len(gold) != len(completions):
        raise ConfigError(f"The reward {reward} got {len(gold)} gold answers for {len(completions)} completions.")
    return gold


def exact_match(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    scorer: Callable[[str, str], bool] = answers_match,
    **columns: Any,
) -> list[float | None]:
    """1 where ``scorer(response, gold)`` holds (same choice letter, number or normalised text), else 0."""
    pairs = zip(completions, _gold("exact_match", completions, answer, solution), strict=True)
    return [None if gold is None else float(scorer(response_text(text), gold)) for text, gold in pairs]


def choice(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the response's final answer has the gold choice's letter, else 0; None where the gold is no choice."""
    rewards: list[float | None] = []
    for text, gold in zip(completions, _gold("choice", completions, answer, solution), strict=True):
        letters = {letter for answer in alternatives(gold) if (letter := choice_letter(answer)) is not None}
        rewards.append(float(choice_letter(response_text(text)) in letters) if letters else None)
    return rewards


def _conclusion(text: str) -> str | None:
    """What follows the one reasoning block that a response begins with."""
    match = REASONING.fullmatch(text)
    if match is None or re.search(r"</?(?:reason|think)>", match[2] + match[3]):
        return None
    return match[3]


def prompt_opening(processor: Any, **template_options: Any) -> str:
    """What a chat template writes of the reasoning block itself, at the end of a prompt: ``"<think>\\n"``, or ``""``.

    Args:
        processor: with the template.
        **template_options: passed to ``apply_chat_template``.
    """
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_options)
    found = OPENED.search(text)
    return found[0] if found else ""


def _conclusions(completions: Sequence[Completion], opened: str) -> list[str | None]:
    """What follows the reasoning block of each response, of which the prompt may have written a part."""
    texts = [response_text(completion) for completion in completions]
    whole = [_conclusion(opened + text) for text in texts]
    if "</" not in opened:
        return whole
    # The prompt has an empty block already; the response may have one of its own.
    return [_conclusion(text) or conclusion for text, conclusion in zip(texts, whole, strict=True)]


def boxed_format(completions: Sequence[Completion], opened: str = "", **columns: Any) -> list[float | None]:
    r"""1 for ``<reason>...</reason>`` and then one ``\boxed{...}`` (arXiv 2606.00564, its system prompt), else 0.

    The block may also be called ``<think>``; text around the box is allowed. ``opened`` is what the prompt has written
    of the block (``prompt_opening``), which a response does not repeat.
    """
    conclusions = _conclusions(completions, opened)
    return [float(text is not None and text.count("\\boxed{") == 1 and bool(last_boxed(text))) for text in conclusions]


def tagged_format(completions: Sequence[Completion], opened: str = "", **columns: Any) -> list[float | None]:
    """1 for ``<reason>...</reason>`` (or ``<think>``) and then ``<answer>...</answer>`` and no more, else 0.

    ``opened`` as of ``boxed_format``.
    """
    conclusions = _conclusions(completions, opened)
    return [float(text is not None and TAGGED.fullmatch(text) is not None) for text in conclusions]


def math_verify(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the final answer equals the gold one as mathematics, else 0; None where the gold one cannot be read.

    TRL's ``accuracy_reward``, with both final answers (``vgs.data.answers``) as the LaTeX in a ``\boxed{}``.

    Raises:
        ImportError: math-verify is not installed.
    """
    gold = _gold("math_verify", completions, answer, solution)
    rewards: list[float | None] = []
    for completion, answers in zip(completions, gold, strict=True):
        boxed = [{"role": "assistant", "content": _boxed(response_text(completion))}]
        right = [_boxed(answer) for answer in alternatives(answers)]
        found = [x for x in accuracy_reward([boxed] * len(right), right) if x is not None] if right else []
        rewards.append(max(found, default=None))
    return rewards


def _boxed(text: str) -> str:
    answer = final_answer(text).rstrip(".").strip("$ ")
    return f"\\boxed{{{answer}}}"


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "choice": choice,
    "format": boxed_format,
    "tagged_format": tagged_format,
    "math_verify": math_verify,
}


FORMATS = (boxed_format, tagged_format)


def same_text(response: str, gold: str) -> bool:
    """Whether the final answer of a response is the gold text, without regard to case and white space."""
    texts = [" ".join(text.split()).lower() for text in (final_answer(response), gold)]
    return texts[0] == texts[1]


#: Comparisons of a response with its gold answer, by name; the first is the default.
SCORERS: dict[str, Callable[[str, str], bool]] = {"answers_match": answers_match, "same_text": same_text}


def _named(key: str, name: Any, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A function by its name among the known ones, or by ``module:function``, imported from the working directory.

    Raises:
        ConfigError: an unknown name, or a module or function that does not exist.
    """
    if name in known:
        return known[name]
    if not isinstance(name, str) or ":" not in name:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Expected one of {', '.join(known)}."
        raise ConfigError(f"{key} has the unknown name {name!r}. {hint} A function of yours is module:function.")
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory
    try:
        found = getattr(import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module does
        says = in_one_line(error)
        raise ConfigError(f"{key} {name!r}: the module {module!r} cannot be imported ({says}).") from error
    if not callable(found):
        raise ConfigError(f"{key} {name!r}: the module {module!r} has no function {attribute!r}.")
    return found


def find_scorer(name: str | None) -> Callable[[str, str], bool]:
    """A comparison ``scorer(response_text, gold_answer) -> bool``: of ``SCORERS``, or ``module:function``.

    Args:
        name: None: ``answers_match``, the default (``vgs.data.answers``).

    Raises:
        ConfigError: an unknown name, or a module or function that does not exist.
    """
    if name is None or SCORERS.get(name) is answers_match:
        return answers_match
    scorer = _named("scorer", name, SCORERS)

    def any_of(response: str, gold: str | Sequence[str]) -> bool:
        return any(bool(scorer(response, answer)) for answer in alternatives(gold))

    return any_of


def check_rewards(names: Sequence[str]) -> None:
    """See that rewards exist and can run.

    Raises:
        ConfigError: no name, an unknown one, one given twice, or one whose package is missing.
    """
    if isinstance(names, str) or not names:
        raise ConfigError(f"rewards must be a list of names out of {', '.join(REWARDS)}, got {names!r}.")
    for name in names:
        _named("rewards", name, REWARDS)
        if list(names).count(name) > 1:
            raise ConfigError(f"rewards must have every name once, got {name!r} {list(names).count(name)} times.")
    if "math_verify" in names and not is_math_verify_available():
        raise ConfigError("rewards: math_verify needs a package that is not installed: pip install math-verify.")


def needs_answers(names: Sequence[str]) -> bool:
    """Whether any of these rewards reads gold answers."""
    return bool({"exact_match", "choice", "math_verify"} & set(names))


def named_rewards(names: Sequence[str], scorer: Callable[[str, str], bool] | None = None) -> list[Reward]:
    """Rewards by name (``REWARDS``) or ``module:function``; ``scorer`` replaces the comparison of ``exact_match``.

    Raises:
        ConfigError: as ``check_rewards``.
    """
    check_rewards(names)
    own = {} if scorer is None else {"exact_match": functools.partial(exact_match, scorer=scorer)}
    return [own.get(name) or _named("rewards", name, REWARDS) for name in names]


def that_know_the_prompt(rewards: Iterable[Any], processor: Any, **template_options: Any) -> list[Any]:
    """The rewards, of which those of the format know what the chat template opens (``prompt_opening``)."""
    rewards = list(rewards)
    if not any(reward in FORMATS for reward in rewards):
        return rewards
    opened = prompt_opening(processor, **template_options)
    return [functools.partial(x, opened=opened) if x in FORMATS and opened else x for x in rewards]
