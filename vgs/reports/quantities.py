"""What is shown of a logged value: its title, its unit, and its number as text."""

from __future__ import annotations

import re
from typing import NamedTuple


class Quantity(NamedTuple):
    """A logged value. ``unit``: ``"share"`` (shown in percent), ``"nats"``, ``"seconds"``, ``"degrees"`` or ``""``."""

    title: str
    unit: str
    meaning: str = ""


#: In the order in which they are shown; what is not here comes after them.
MAIN: dict[str, Quantity] = {
    "eval_accuracy": Quantity("Right answers, held out", "share", "greedy answers to held-out questions"),
    "accuracy": Quantity("Right answers, sampled", "share", "the answers that the student was trained on"),
    "reward": Quantity("Reward", "", "mean over the sampled answers"),
    "loss": Quantity("Loss", "", "what is minimised, eta included"),
    "divergence": Quantity("Divergence", "nats", "of the preset, per token"),
    "standard": Quantity("Standard", "nats", "KL(p_I ‖ q_I): student and teacher, with image"),
    "visual": Quantity("Visual", "nats", "KL(p_I ‖ q*): the student and what the image should have told it"),
    "language": Quantity("Language", "nats", "KL(p_x ‖ q_x): student and teacher, without image"),
    "vds": Quantity("Visual dependency", "nats", "KL(q_I ‖ q_x): what the image changes in the teacher"),
    "student_vds": Quantity("Student's dependency", "nats", "KL(p_I ‖ p_x): what the image changes in the student"),
    "entropy": Quantity("Entropy", "nats", "of the student, per token"),
    "gate": Quantity("Gated tokens", "share", "tokens that the language term counts"),
    "eta": Quantity("eta", "", "the scale of the whole loss"),
    "gamma_effective": Quantity("gamma in force", "", "the weight of the visual term, as a guard may have lowered it"),
    "sight": Quantity("Sight", "share", "the share of the teacher's visual dependency that the student has"),
}
#: The values of a token; the first is what answers are coloured by unless another is chosen.
TOKEN_VALUES = {
    "vds": "visual dependency (teacher)",
    "student_vds": "visual dependency (student)",
    "gain": "visual gain (student)",
    "teacher_gain": "visual gain (teacher)",
    "standard": "KL(student ‖ teacher)",
}
PHASES = {
    "sampling": "sampling",
    "teacher": "teacher",
    "eta": "measuring eta",
    "student": "student, forward and backward",
    "optimizer": "optimizer",
    "step": "whole step",
}
BINNED = re.compile(r"(eval_)?(.+)_bin_(\d+)")
TIMED = re.compile(r"(eval_)?step_time(_\w+)?")
HELD_OUT = re.compile(r"eval_(?:(.+)_)?accuracy")


def quantity(key: str) -> Quantity:
    """What is said of a logged key."""
    if key in MAIN:
        return MAIN[key]
    if match := HELD_OUT.fullmatch(key):
        return Quantity(f"Right answers, {match[1]}", "share", f"greedy answers to the questions of {match[1]}")
    if key.startswith("test "):
        return Quantity(f"Test: {key[5:]}", "share", "greedy answers after the run")
    if key.startswith("gap "):
        return Quantity(f"Gap to itself, {key[4:]}", "nats", "KL(the model with this context ‖ without), its answers")
    if key.startswith("to_start "):
        meaning = "KL(the model before the run with this context ‖ after it without), the latter's answers"
        return Quantity(f"Gap to the start, {key[9:]}", "nats", meaning)
    if key in ("seconds_per_step", "step_time"):
        return Quantity("Seconds per step", "seconds")
    if key.startswith("eval_") and key[5:] in MAIN:
        known = MAIN[key[5:]]
        return Quantity(f"{known.title}, held out", known.unit, known.meaning)
    return Quantity(key, "")


def shown(value: float | int, unit: str = "") -> str:
    """A number as the page has it: three digits that count, and percent for shares."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e5 and unit == ""):
        return f"{int(value)}"
    if unit == "degrees":
        return f"{value:.1f}°"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
        return f"{value:.{digits}f}"
    return f"{value:.2e}"
