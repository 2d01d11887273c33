"""Whether a response to a benchmark's question is right, by rule: lmms-eval's ``process_results``.

Every comparison ends in ``vgs.data.answers.answers_match``; nothing asks another model. What stands before it:

* a choice is matched by its letter or by its option's text; where the dataset names several letters, by the same set;
* in mathematics, degree signs are dropped and ``√``, ``π``, ``×`` are written as LaTeX, on both sides;
* VlmsAreBlind asks for answers in curly brackets: the last pair counts, else what the response says without them;
  rows and columns are read in any order that names them.

A response that was cut off before it says its answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...data.answers import answers_match, final_answer
from .questions import mathverse_options, mathvision_options, mmmu_pro_options

Row = Mapping[str, Any]
SYMBOLS = (
    (re.compile(r"\^\{?\\circ\}?|\\degree|\\circ|°"), ""),
    (re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\w+))"), lambda x: rf"\sqrt{{{x[1] or x[2] or x[3]}}}"),
    (re.compile("π"), r"\\pi "),
    (re.compile("×"), r"\\times "),
)
BRACES = re.compile(r"\{\s*([^{}]*?)\s*\}")
GRID = re.compile(r"\d+|rows?|col(?:umn)?s?", flags=re.IGNORECASE)


def as_latex(text: str) -> str:
    """Degree signs dropped, and other signs of mathematics as LaTeX commands."""
    for pattern, replacement in SYMBOLS:
        text = pattern.sub(replacement, text)
    return text


def choice_is_right(response: str, gold: str, options: Sequence[str] = ()) -> bool:
    """Whether a response commits to the right option.

    Args:
        response: its text.
        gold: the right letter, or several as ``A, C``.
        options: the options' texts in the order of their letters, if they are texts; the right one's counts as well.
    """
    several = "".join(re.findall(r"[A-J]", gold.upper()))
    if len(several) > 1 and re.fullmatch(r"[A-J\s,;&]+", gold.upper()):
        said = "".join(re.findall(r"\b[A-J]+\b", final_answer(response).upper()))
        return set(said) == set(several)
    index = ord(gold.strip().upper()) - ord("A") if len(gold.strip()) == 1 else -1
    if 0 <= index < len(options) and options[index].strip():
        gold = f"({gold.strip().upper()}) {as_latex(options[index]).strip()}"
    return answers_match(as_latex(response), gold)


def answer_is_right(response: str, gold: str) -> bool:
    """Whether a response's number, formula or text is the gold one."""
    return answers_match(as_latex(response), as_latex(gold))


def blind_answer(response: str, task: str) -> str:
    """What a response to a question of VlmsAreBlind answers, in the form of the dataset's ``groundtruth``.

    Args:
        response: its text.
        task: the row's ``task``, of which those about grids are answered by ``rows,columns``, touching circles by yes
            or no, and others by a number or a letter.
    """
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*(?=\{)|\\(?=[{}])|\$|\*\*", "", final_answer(response))
    braced = BRACES.findall(answer)
    task = task.lower()
    if task.startswith("counting grid"):
        last_line = answer.strip().rpartition("\n")[2]
        return _grid(answer) or _grid(last_line) or _grid(" ".join(braced[-2:])) or answer
    if braced:
        answer = braced[-1]
    if task == "touching circles":
        said = {word.lower() for word in re.findall(r"\b(?:yes|no)\b", answer, flags=re.IGNORECASE)}
        return said.pop() if len(said) == 1 else answer
    return answer.strip("\"'` ")


def _grid(answer: str) -> str | None:
    """``5,6`` of ``rows={5} columns={6}``, ``6 columns and 5 rows``, ``{5}{6}`` or ``5 x 6``: rows first."""
    found = [part.lower() for part in GRID.findall(answer)]
    numbers = [part for part in found if part.isdigit()]
    words = [part[0] for part in found if not part.isdigit()]
    if len(numbers) != 2 or sorted(words) not in ([], ["c", "r"]):
        return None
    return ",".join(reversed(numbers) if words == ["c", "r"] else numbers)


def blind_is_right(response: str, gold: str, task: str) -> bool:
    """As ``answer_is_right``, for a row of VlmsAreBlind."""
    if task.lower().startswith("counting grid"):  # in order: mathematics would take two numbers for a set
        return blind_answer(response, task) == re.sub(r"\s", "", gold)
    return answers_match(blind_answer(response, task), gold)


def _results(is_right: Callable[[Row, str], bool]) -> Callable[[Row, Sequence[str]], dict[str, Any]]:
    def process_results(doc: Row, results: Sequence[str]) -> dict[str, Any]:
        """``scores``: 1.0 or 0.0 for every response; ``acc``: their mean."""
        scores = [float(is_right(doc, response)) for response in results]
        return {"acc": sum(scores) / len(scores), "scores": scores}

    return process_results


mmmu_pro_results = _results(lambda doc, text: choice_is_right(text, doc["answer"], mmmu_pro_options(doc)))
logicvista_results = _results(lambda doc, text: choice_is_right(text, doc["answer"]))
mathverse_results = _results(
    lambda doc, text: (
        choice_is_right(text, doc["answer"], mathverse_options(doc))
        if doc["question_type"] == "multi-choice"
        else answer_is_right(text, doc["answer"])
    )
)
visualpuzzles_results = _results(lambda doc, text: choice_is_right(text, doc["answer"], doc["options"] or ()))
mathvision_results = _results(
    lambda doc, text: (
        choice_is_right(text, str(doc["answer"]), mathvision_options(doc))
        if doc["options"]
        else answer_is_right(text, str(doc["answer"]))
    )
)
vlmsareblind_results = _results(lambda doc, text: blind_is_right(text, doc["groundtruth"], doc["task"]))
