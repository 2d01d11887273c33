"""Options of a run inside another trainer: from a file or a variable, refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vgs import PRESETS, ConfigError
from vgs.integrations.options import HostOptions, read_options
from vgs_kernels import VGSObjective

ROOT = Path(__file__).parents[2]


def test_a_text_and_a_file_say_the_same(tmp_path: Path) -> None:
    values = {"teacher": "a/b", "objective": {"gamma": 1.0, "lam": 0.0}, "policy_coefficient": 0.5}
    file = tmp_path / "vgs.yaml"
    file.write_text(yaml.safe_dump(values))
    text = "{teacher: a/b, objective: {gamma: 1.0, lam: 0.0}, policy_coefficient: 0.5}"
    options = read_options({"VGS_OPTIONS": str(file)}, needs_teacher=True)
    assert options == read_options({"VGS_OPTIONS": text}) == HostOptions(**values)


def test_the_gate_sees_all_ranks_where_nothing_else_is_said() -> None:
    assert HostOptions().resolved() == (PRESETS["vgs"], VGSObjective(vds_scope="ranks"))
    assert HostOptions(objective={"gamma": 1.0}).resolved()[1] == VGSObjective(gamma=1.0, vds_scope="ranks")
    assert HostOptions(objective={"vds_scope": "trajectory"}).resolved()[1].vds_scope == "trajectory"


def test_the_mean_is_the_papers_or_what_is_said() -> None:
    assert HostOptions().reduction == "trajectory"
    assert HostOptions(loss_reduction="token").reduction == "token"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{techer: x}", r"^VGS_OPTIONS has the option 'techer'; expected some of teacher, objective, .*\.$"),
        ("{objective: vgss}", r"^objective 'vgss' is not known; did you mean 'vgs'\?$"),
        ("{objective: {gama: 1}}", r"^objective: .*'gama'"),
        ("{objective: {gamma: -1}}", r"^objective: gamma must be >= 0, got -1\.$"),
        ("{objective: opsd}", r"teacher of kind"),
        ("{objective: 3}", r"^objective must be a text or a mapping, got 3\.$"),
        ("{loss_reduction: mean}", r"^loss_reduction must be one of trajectory, token, None, got 'mean'\.$"),
        ("{teacher_placement: gpu}", r"^teacher_placement must be one of sharded, whole, got 'gpu'\.$"),
        ("{teacher_offload: 1}", r"^teacher_offload must be true or false, got 1\.$"),
        ("{policy_coefficient: -0.1}", r"^policy_coefficient must be a number >= 0, got -0\.1\.$"),
        ("{vocab_size: -5}", r"^vocab_size must be a whole number > 0, got -5\.$"),
        ("{a: [", r"^VGS_OPTIONS is no YAML: "),
        ("/nowhere/vgs.yaml", r"^VGS_OPTIONS names the file '/nowhere/vgs.yaml', which cannot be read: "),
    ],
)
def test_wrong_options_are_named(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        read_options({"VGS_OPTIONS": text})
    assert "\n" not in str(error.value)


def test_a_host_without_a_teacher_of_its_own_must_be_given_one() -> None:
    with pytest.raises(ConfigError, match=r"^VGS_OPTIONS must have the option teacher"):
        read_options({}, needs_teacher=True)


@pytest.mark.parametrize("name", ["verl/vgs.yaml", "swift/vgs.yaml"])
def test_the_files_that_come_along_are_right(name: str) -> None:
    options = read_options({"VGS_OPTIONS": str(ROOT / "configs" / "hosts" / name)}, needs_teacher="verl" in name)
    assert options.resolved()[1].eta == 0.41
