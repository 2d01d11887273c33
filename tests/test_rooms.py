"""The rooms stand above what they use, no file is long, every package says what it is for, and the picture is true."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import rooms

FAKES = {
    "vgs/__init__.py": '"""All of it. In one place."""\n',
    "vgs/errors.py": "",
    "vgs/models/__init__.py": '"""Models. Seen from outside."""\n',
    "vgs/models/heads.py": "from ..errors import ConfigError\n",
    "vgs/data/__init__.py": '"""Data. And prompts."""\n',
    "vgs/data/prompts.py": "def f():\n    from ..models import heads\n    import vgs_kernels.driver\n",
    "vgs_kernels/__init__.py": '"""Losses. Fused."""\n',
    "vgs_kernels/sweep.py": "import torch\n",
}


def fake_project(folder: Path, changes: Mapping[str, str] = MappingProxyType({})) -> Path:
    """A small project that keeps the rules, with the text of some files replaced or added."""
    for name, text in {**FAKES, **changes}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def upward(folder: Path) -> list[str]:
    return rooms.upward(rooms.find_imports(rooms.find_modules(folder))[0])


# The project as it is.


def test_every_module_is_in_a_room():
    for module in rooms.find_modules():
        rooms.room_of(module)


def test_no_import_points_upward():
    assert not upward(rooms.ROOT)


def test_the_kernels_need_torch_and_triton_only():
    inside, outside = rooms.find_imports(rooms.find_modules())
    names = {x.imported.split(".")[0] for x in outside if x.importer.startswith("vgs_kernels")}
    assert names - set(sys.stdlib_module_names) <= {"torch", "triton"}
    assert not [x for x in inside if x.importer.startswith("vgs_kernels") and x.imported.split(".")[0] == "vgs"]


def test_no_file_is_longer_than_400_lines():
    assert not rooms.too_long(rooms.ROOT / name for name in ("vgs", "vgs_kernels", "tests", "benchmarks"))


def test_every_package_says_what_it_is_for():
    assert not rooms.wordless(rooms.find_modules())


def test_folders_of_tests_are_named_after_rooms():
    folders = {path.name for path in (rooms.ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert folders <= {*rooms.LAYERS, "kernels", "gpu", "emulation", "benchmarks", "examples"}


def test_the_picture_shows_the_rooms_as_they_are():
    recorded, current = rooms.recorded_graph(), rooms.current_graph()
    assert recorded == current, f"docs/rooms.png shows other imports than the code has; draw it again: {rooms.REDRAW}"


# That each of these can fail.


def test_a_project_that_keeps_the_rules_passes(tmp_path):
    project = fake_project(tmp_path)
    assert not upward(project)
    assert not rooms.wordless(rooms.find_modules(project))
    assert rooms.current_graph(project)["imports"]["data"] == {"models": 1, "vgs_kernels": 1}


@pytest.mark.parametrize(
    ("statement", "imported"),
    [
        ("from vgs.data.prompts import f", "vgs.data.prompts"),
        ("from ..data.prompts import f", "vgs.data.prompts"),
        ("from ..data import prompts", "vgs.data.prompts"),
        ("from .. import data", "vgs.data"),
        ("import vgs.data.prompts as p", "vgs.data.prompts"),
        ("def f():\n    from ..data.prompts import f", "vgs.data.prompts"),
        ("class A:\n    def f(self):\n        import vgs.data", "vgs.data"),
        ("if TYPE_CHECKING:\n    from ..data import prompts", "vgs.data.prompts"),
        ("import_module('vgs.data.prompts')", "vgs.data.prompts"),
        ("importlib.import_module('vgs.data')", "vgs.data"),
        ("import_module('..data', __package__)", "vgs.data"),
        ("from vgs import VGSTrainer", "vgs"),
    ],
)
def test_an_import_upward_is_found_wherever_it_stands(tmp_path, statement, imported):
    found = upward(fake_project(tmp_path, {"vgs/models/heads.py": statement}))
    assert len(found) == 1
    assert f"imports {imported}, and" in found[0]


def test_an_import_upward_is_found_in_a_package_itself(tmp_path):
    assert len(upward(fake_project(tmp_path, {"vgs/models/__init__.py": "from ..data import prompts"}))) == 1


def test_kernels_that_import_the_method_are_found(tmp_path):
    assert len(upward(fake_project(tmp_path, {"vgs_kernels/sweep.py": "from vgs.errors import ConfigError"}))) == 1


def test_one_step_stands_between_data_and_evaluation(tmp_path):
    allowed = fake_project(tmp_path / "a", {"vgs/one_step.py": "from .data import prompts"})
    assert not upward(allowed)
    refused = fake_project(
        tmp_path / "b",
        {
            "vgs/one_step.py": "from .evaluation import kl_gap",
            "vgs/evaluation/kl_gap.py": "from .. import one_step",
        },
    )
    assert ["vgs.one_step" in line for line in upward(refused)] == [True]


def test_a_module_without_a_room_is_found(tmp_path):
    with pytest.raises(ValueError, match=r"vgs\.attic is in no room"):
        rooms.current_graph(fake_project(tmp_path, {"vgs/attic.py": ""}))


def test_a_long_file_is_found(tmp_path):
    project = fake_project(tmp_path, {"vgs/models/heads.py": "x = 1\n" * 401, "vgs/errors.py": "x = 1\n" * 400})
    assert [line.split(" has ")[1] for line in rooms.too_long([project])] == ["401 lines, at most 400"]


@pytest.mark.parametrize("text", ["", '"""One sentence alone, with a name like a.b in it."""'])
def test_a_package_without_words_is_found(tmp_path, text):
    modules = rooms.find_modules(fake_project(tmp_path, {"vgs/models/__init__.py": text}))
    assert len(rooms.wordless(modules)) == 1


def test_a_drawn_picture_knows_its_graph(tmp_path):
    graph = rooms.current_graph()
    rooms.draw(graph, tmp_path / "rooms.png")
    assert rooms.recorded_graph(tmp_path / "rooms.png") == graph
