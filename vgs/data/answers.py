"""The final answer of a response, and whether it is the gold one.

``answers_match`` is the default everywhere that answers are compared. It takes what a response commits to
(``final_answer``, or what follows "the answer is") and compares, in this order:

1. a gold choice letter with the response's letter, as evaluation harnesses do (``C``, ``c``, ``(C)``, ``C. 42``); a
   gold choice with its text, ``(A) red``, is also matched by that text;
2. numbers by value: ``1,024``, ``$3.50``, ``1/2``, ``\\frac{1}{2}``, ``0.5``, ``50%``;
3. equal text, without regard to case, white space, quotes, ``$`` and a full stop;
4. mathematics as ``math-verify`` sees it, where that package is installed and both sides are formulas.

An empty gold answer is matched by nothing.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

logger = logging.getLogger(__name__)

MARKUP = r"\\(?:text|mathrm|mathbf|textbf|boldsymbol)\{([^{}]*)\}"  # LaTeX around an answer
STATED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*(?:\*\*)?\s*(\S.*?)\s*(?:\*\*)?\s*(?:[.!]?\s*$|[.!]\s|\n)",
    flags=re.IGNORECASE | re.MULTILINE,
)
LETTER = r"\(?([A-Ja-j])\)?"
NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?:/(\d+))?(%?)", flags=re.IGNORECASE)
LONGEST_FORMULA = 200  # characters; longer ones are compared as text
# Words that a formula may contain; others make it a text, of which math-verify would make products of letters.
FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi inf infty min max mod gcd lcm"
)


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


def _committed(text: str) -> str:
    return re.sub(MARKUP, r"\1", final_answer(text)).strip()


def _stated(answer: str) -> str | None:
    """What follows the last "the answer is" of a text."""
    found = STATED.findall(answer)
    return found[-1] if found else None


def _normalise(answer: str) -> str:
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer).replace("$", "").replace("\\%", "%").replace("**", "")
    answer = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:left|right|,|;|!| )", "", answer))
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip("\"'` ").casefold()


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer such as ``B``, ``(B)``, ``b``, ``B. 42`` or ``the answer is B``."""
    for text in filter(None, (answer, _stated(answer))):
        if found := re.match(r"\s*(?:\(([A-Ja-j])\)|([A-Ja-j])(?:[.):](?!\w)|\s*$))", text.strip("*$ ")):
            return (found[1] or found[2]).upper()
    for word in ("[Aa]nswer", "[Oo]ption|[Cc]hoice"):  # "option A is wrong: the answer is C"
        if stated := re.findall(rf"\b(?:{word})(?:\s+is)?\s*:?\s*\(?([A-J])\b", answer):
            return stated[-1]
    return None


def choice_letter(text: str) -> str | None:
    """The upper-case letter of the multiple-choice answer that a response (or a gold answer) commits to, if it does."""
    return _choice(_committed(text))


def _number(answer: str) -> tuple[Fraction, bool] | None:
    """The value of a plain number and whether it is in percent."""
    answer = re.sub(r"^([+-]?)\\frac\{?(\d+)\}?\{?(\d+)\}?(?=%?$)", r"\1\2/\3", answer.replace(" ", ""))
    found = NUMBER.fullmatch(answer)
    if found is None or len(answer) > 60 or (found[2] and int(found[2]) == 0):
        return None
    exponent = re.search(r"e[+-]?(\d+)", found[1], flags=re.IGNORECASE)
    if exponent and int(exponent[1]) > 400:
        return None
    return Fraction(found[1]) / int(found[2] or 1), bool(found[3])


def _same_number(given: tuple[Fraction, bool], gold: tuple[Fraction, bool]) -> bool:
    """50% is 0.5 and 50 %, but not 50."""
    return given[0] / (100 if given[1] else 1) == gold[0] / (100 if gold[1] else 1)


def _is_formula(answer: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", answer))
    foreign = set(words) - set(FUNCTIONS.split())
    return len(answer) <= LONGEST_FORMULA and not foreign and re.search(r"[\d\\]", answer) is not None


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        logger.info("math-verify is not installed: formulas are compared as text.")
        return None
    return math_verify


def _same_formula(given: str, gold: str) -> bool:
    library = _math_verify()
    if library is None or not (_is_formula(given) and _is_formula(gold)):
        return False
    # Its time limits are alarms, which only a main thread has; the length of formulas bounds the rest.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    settings = {"extraction_config": [library.LatexExtractionConfig()], "parsing_timeout": limit}
    try:
        sides = [library.parse(f"\\boxed{{{side.strip('$ ')}}}", **settings) for side in (gold, given)]
        return all(sides) and bool(library.verify(*sides, timeout_seconds=limit))
    except Exception as error:  # a formula that the package cannot read is not a right one
        logger.debug("math-verify cannot compare %r and %r: %s", given, gold, error)
        return False


def _matches(response: str, gold: str) -> bool:
    given, gold = _committed(response), _committed(gold)
    if not given or not gold:
        return False
    if letter := re.fullmatch(rf"{LETTER}\.?", gold):
        return _choice(given) == letter[1].upper()
    if option := re.fullmatch(r"(?:\(([A-J])\)|([A-J])[.):])\s+(\S.*)", gold, flags=re.DOTALL):
        gold = option[3]
        if _choice(given) is not None:
            return _choice(given) == (option[1] or option[2])
    return any(_same_answer(text, gold) for text in (given, _stated(given), _option_text(given)) if text)


def _option_text(answer: str) -> str | None:
    """``red`` of ``(A) red``."""
    found = re.fullmatch(r"(?:\([A-J]\)|[A-J][.):])\s+(\S.*)", answer, flags=re.DOTALL)
    return found[1] if found else None


def _same_answer(given: str, gold: str) -> bool:
    plain, right = _normalise(given), _normalise(gold)
    if plain == right:
        return bool(right)
    number, gold_number = _number(plain), _number(right)
    if number is not None and gold_number is not None:
        return _same_number(number, gold_number)
    return _same_formula(given, gold)


def answers_match(response: str, gold: str | Sequence[str] | None) -> bool:
    """Whether a response's final answer is the gold answer, or any of several.

    Args:
        response: text of a response.
        gold: the right answer, or a list of alternatives; nothing matches None, an empty list or empty text.
    """
    return any(_matches(response, answer) for answer in alternatives(gold))


def alternatives(gold: str | Sequence[str] | None) -> list[str]:
    """The right answers, as a list."""
    return [] if gold is None else [gold] if isinstance(gold, str) else list(gold)
