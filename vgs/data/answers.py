"""The final answer of a response, and whether it is the gold one."""

from __future__ import annotations

import re

MARKUP = r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}"  # LaTeX around an answer


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` of a text holds; None without one that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return None  # cut off before the closing brace


def final_answer(text: str) -> str:
    """The answer a response commits to: its last ``\\boxed{}``, else its last ``<answer>``, else what follows the
    reasoning block, else all of it."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (tagged[-1] if tagged else re.split(r"</(?:reason|think)>", text)[-1]).strip()


def _normalise(answer: str) -> str:
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer).replace("$", "").replace("\\%", "%")
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip().casefold()


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer such as ``B``, ``(B)``, ``B. 42`` or ``the answer is B``."""
    letter = r"\(([A-J])\)|([A-J])"
    match = re.match(r"\s*(?:\(([A-J])\)|([A-J])(?:[.):]|\s*$))", answer)
    match = match or re.search(rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*(?:{letter}\b)", answer)
    return next(filter(None, match.groups())) if match else None


def _committed(text: str) -> str:
    return re.sub(MARKUP, r"\1", final_answer(text))


def choice_letter(text: str) -> str | None:
    """The letter of the multiple-choice answer that a response (or a gold answer) commits to, if it does."""
    return _choice(_committed(text))


def answers_match(response: str, gold: str) -> bool:
    """Whether a response's final answer is the gold answer: the same choice letter, number, or normalised text.

    Args:
        response: all of its text.
        gold: the gold answer, or a text that ends in it as ``final_answer`` reads it.
    """
    given, gold = _committed(response), _committed(gold)
    if re.fullmatch(r"\(?[A-J]\)?\.?", gold):
        return _choice(given) == _choice(gold.rstrip("."))
    given, gold = _normalise(given), _normalise(gold)
    try:
        return float(given.rstrip("%")) == float(gold.rstrip("%")) and given.endswith("%") == gold.endswith("%")
    except ValueError:
        return given == gold
