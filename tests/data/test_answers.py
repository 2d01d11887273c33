"""What counts as the gold answer: the documented default of exact_match."""

from __future__ import annotations

import concurrent.futures

import pytest

from vgs.data.answers import answers_match, choice_letter, final_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<reason>\boxed{1}</reason> so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<answer> 3 </answer>", "3"),
        ("<reason> 1 + 1 </reason> 2", "2"),
        (r"\boxed{cut off", r"\boxed{cut off"),
    ],
)
def test_final_answer(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"so \boxed{B}", "B", True),
        (r"\boxed{(B) 42}", "B", True),
        (r"\boxed{\text{B}}", "B", True),
        ("the answer is (C).", "C", True),
        ("B. because", "(B)", True),
        (r"\boxed{A}", "B", False),
        ("A cat is what I see", "A", False),
        ("no letter here", "A", False),
        ("c", "C", True),
        ("C", "c", True),
        ("(c)", "C", True),
        ("The answer is c.", "C", True),
        ("Answer: **B**", "B", True),
        ("Option A is wrong, so the answer is C because of it", "C", True),
        ("The answer is C, not option B", "C", True),
        ("a cat", "A", False),
        ("e.g. a house", "E", False),
        ("A", "(A) red", True),
        ("(A) red", "A", True),
        ("red", "(A) red", True),
        ("(B) blue", "(A) red", False),
        ("The answer is red.", "(A) red", True),
        ("(A) red", "red", True),
        ("The answer is 7.", "7", True),
        ("So the answer is: 7", "7", True),
        ("The answer is 3. No, the answer is 7.", "7", True),
        ("The answer is 7. No, the answer is 3.", "7", False),
        ("I count 3 and 7", "7", False),
        (r"\boxed{1,024}", "1024.0", True),
        (r"\boxed{$3.50}", "3.5", True),
        (r"\boxed{50\%}", "50%", True),
        (r"\boxed{50\%}", "0.5", True),
        (r"\boxed{50}", "50%", False),
        (r"\boxed{3}", "4", False),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\frac12}", "0.5", True),
        ("0.5", "1/2", True),
        ("1/3", "0.333", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("1e999999999", "2", False),
        (r"\boxed{ Blue  whale. }", "blue whale", True),
        ("<reason>7</reason> 8", "7", False),
        (r"\boxed{7}", r"it is \boxed{7}", True),
        ("listen", "silent", False),  # a product of letters would be the same
        ("ab", "ba", False),
        ("", "", False),
        (r"\boxed{}", "", False),
        ("", "7", False),
        ("None", None, False),
        ("seven", ["7", "seven"], True),
        ("7", ["7", "seven"], True),
        ("8", ["7", "seven"], False),
        ("7", [], False),
    ],
)
def test_answers_match(response: str, gold: str | list[str] | None, right: bool) -> None:
    assert answers_match(response, gold) is right


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(1, 2)}", "(2, 1)", False),
        (r"\boxed{\frac{\pi}{2}}", r"\pi/2", True),
        (r"\boxed{\frac{", r"\frac{1}{2}", False),
    ],
)
def test_formulas_are_compared_as_mathematics(response: str, gold: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert answers_match(response, gold) is right
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # where no alarm can be set
        assert pool.submit(answers_match, response, gold).result() is right


def test_choice_letters_are_upper_case() -> None:
    assert [choice_letter(text) for text in ("b", "(B) 42", "the answer is C", "42", "e.g. this")] == [
        "B",
        "B",
        "C",
        None,
        None,
    ]
