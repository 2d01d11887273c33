"""The survey over all families: what it finds of some, and the page that it writes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vgs.models import survey as surveys
from vgs.models.survey import Entry, page, survey, survey_family
from vgs.models.survey_models import SURVEYED, tiny_config
from vgs.models.survey_tables import FIELDS, GIVEN, OPTIONS, REASONS

NEWEST = "mistral_large4" in SURVEYED  # the library that the tables are written for


@pytest.mark.parametrize(
    ("family", "text"),
    [("internvl", "qwen2"), ("video_llama_3", "qwen2"), ("llava_next", "llama"), ("hunyuan_vl", "hunyuan_vl_text")],
)
def test_families_are_asked_with_a_picture(family: str, text: str) -> None:
    entry = survey_family(family)
    assert (entry.text, entry.way, entry.picture) == (text, "packed", True), entry.details
    assert entry.states < 1e-5 and entry.gradients < 1e-3 and not entry.why and not entry.unseen


def test_a_family_without_packed_rows_says_why() -> None:
    entry = survey_family("git")
    assert (entry.way, entry.picture, entry.refused) == ("padded", False, False)
    assert entry.why == "its attention adds the mask to one of its own"
    assert entry.unseen == "it takes pictures in by a way of its own"


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("blip", "it does not run without a picture: it has no text-only view"),
        ("florence2", "an encoder reads the prompt, a decoder writes: they are not one sequence"),
        ("pi0", "it predicts the actions of a robot, not tokens"),
    ],
)
def test_a_family_that_cannot_be_asked_says_why(family: str, why: str) -> None:
    entry = survey_family(family)
    assert (entry.way, entry.refused, entry.why) == (None, False, why)


def test_a_family_that_cannot_be_built_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(family: str) -> None:
        raise RuntimeError(f"{family} | is\nnot made")

    monkeypatch.setattr(surveys, "tiny_config", fails)
    entry = survey_family("llava")
    assert entry == Entry("llava", why="RuntimeError: llava | is not made", details="RuntimeError: llava | is not made")
    assert "| llava | RuntimeError: llava / is not made |" in page([entry])


def test_a_family_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveys, "survey_family", lambda family: time.sleep(60 if family == "llava" else 0) or ENTRY)
    monkeypatch.setattr(surveys, "SECONDS", 0.5)
    start = time.monotonic()
    slow, quick = survey(["llava", "git"])
    assert time.monotonic() - start < 30
    assert (slow.family, slow.way, slow.why) == ("llava", None, "it took more than 0.5 s or 8 GiB")
    assert quick == ENTRY, "the next ones are asked"


ENTRY = Entry("one", "llama", "packed", True, 2e-7, 3e-6)


def test_the_page_groups_what_was_found() -> None:
    others = [
        Entry("two", "qwen2", "padded", False, 1e-7, 1e-6, why="it counts places", unseen="no token for pictures"),
        Entry("three", "gemma", picture=True, why="states differ by 1e-1 of the largest", refused=True),
        Entry("four", why="it needs the package timm, which was not installed"),
    ]
    text = page([ENTRY, *others])
    assert "1 run in packed rows, 1 in padded batches; 1 in neither; 1 were not tried." in text
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(parts) == [
        "Packed rows",
        "Padded batches",
        "Refused: exact in neither way",
        "Not tried",
        "Tried with text alone",
    ]
    assert "| one | llama | yes | 2e-07 | 3e-06 |" in parts["Packed rows"]
    assert "| two | qwen2 | no | 1e-07 | 1e-06 | it counts places |" in parts["Padded batches"]
    assert "| three | states differ by 1e-1 of the largest |" in parts["Refused: exact in neither way"]
    assert "| four | it needs the package timm" in parts["Not tried"]
    assert "| two | no token for pictures |" in parts["Tried with text alone"]
    assert "None." in page([ENTRY])


def test_the_command_writes_page_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(surveys, "survey", lambda families: asked.append(families) or [ENTRY])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("transformers.logging.set_verbosity_error", lambda: None)
    paths = [tmp_path / "families.md", tmp_path / "families.json"]
    monkeypatch.setattr("sys.argv", ["survey", "--out", str(paths[0]), "--json", str(paths[1])])
    surveys.main()
    assert asked == [list(SURVEYED)] and len(SURVEYED) > 50
    assert paths[0].read_text() == page([ENTRY])
    assert Entry(**json.loads(paths[1].read_text())[0]) == ENTRY


def test_tables_name_families_and_fields_that_exist() -> None:
    for table in (GIVEN, FIELDS, OPTIONS, REASONS) if NEWEST else ():
        assert not table.keys() - SURVEYED.keys()
    assert tiny_config("gemma3").mm_tokens_per_image == FIELDS["gemma3"]["mm_tokens_per_image"]
