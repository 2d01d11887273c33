"""What a run looks at beside its loss: terms by bin, answers token by token, gradients; and that it learns the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from grpo_runs import grpo_trainer
from PIL import Image
from selves import make_self_trainer
from tiny import plain_rows, tiny_image, tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import loss_of, make_trainer, rollout

from vgs import VGSConfig, score_responses
from vgs.errors import ConfigError
from vgs.evaluation.geometry import equal_bins
from vgs.evaluation.token_values import write_samples

TERMS = ("standard", "visual", "language", "vds", "student_vds")


@pytest.mark.parametrize("passes", [None, 120])
def test_terms_by_bin_are_means_over_the_tokens_of_a_bin(tmp_path: Path, passes: int | None) -> None:
    trainer = make_trainer(tmp_path, log_terms_by_bin=4, max_tokens_per_pass=passes, eta=0.5)
    batch = rollout(trainer)
    loss_of(trainer, batch)
    found = {name: values for name, values in trainer.open_metrics.items() if "_bin_" in name}
    responses = [list(map(int, group.responses[0])) for group in batch["groups"]]
    tokens = score_responses(
        trainer.student, trainer.teacher_model, trainer.processing_class, tiny_samples(8), responses, trainer.objective
    )
    columns = {name: torch.cat([row[name] for row in tokens]) for name in TERMS}
    bins = equal_bins(columns["vds"], 4)
    assert {len(chosen) for chosen in bins} <= {len(columns["vds"]) // 4, len(columns["vds"]) // 4 + 1}
    assert set(found) == {f"{name}_bin_{number}" for name in TERMS for number in range(4)}
    for name, values in columns.items():
        for number, chosen in enumerate(bins):
            assert found[f"{name}_bin_{number}"] == [pytest.approx(float(values[chosen].mean()), rel=1e-4, abs=1e-6)]


def test_bins_of_few_tokens_stay_away(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, log_terms_by_bin=12, eta=0.5, max_completion_length=1)
    loss_of(trainer, rollout(trainer))
    assert {int(name.rpartition("_")[2]) for name in trainer.open_metrics if "_bin_" in name} == set(range(8))


@pytest.mark.slow
def test_a_run_learns_the_same_with_all_instruments(tmp_path: Path) -> None:
    options = {"max_steps": 3, "eta": 0.5, "dataloader_pin_memory": False}
    looked = {"log_terms_by_bin": 3, "save_samples": 3, "save_samples_every": 2, "geometry_every": 2}
    runs = []
    for name, more in (("without", {}), ("with", looked)):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, **options, **more)
        trainer.train()
        runs.append(trainer)
    before, after = ([p.detach() for p in trainer.student.parameters()] for trainer in runs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def kept(trainer) -> list[dict]:
        own = ("step_time", "_bin_", "runtime", "per_second")
        return [
            {name: value for name, value in entry.items() if not any(part in name for part in own)}
            for entry in trainer.state.log_history
        ]

    assert kept(runs[0]) == kept(runs[1])
    assert not (tmp_path / "without" / "instruments").exists()
    names = {path.name for path in (tmp_path / "with" / "instruments").glob("*.json")}
    assert names == {f"{kind}-{step:06d}.json" for kind in ("samples", "geometry") for step in (0, 2, 3)}
    for entry in runs[1].state.log_history:
        if "step_time" in entry:
            inside = [entry[f"step_time_{name}"] for name in ("sampling", "teacher")]
            assert min(inside) > 0 and sum(inside) < entry["step_time"] and entry["step_time_optimizer"] > 0


def test_values_of_tokens_are_those_of_whole_tables(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_samples=2, eta=0.5)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    record = json.loads((tmp_path / "instruments" / "samples-000000.json").read_text())
    assert record["step"] == 0 and len(record["samples"]) == 2
    processor, sample = trainer.processing_class, tiny_samples(1)[0]
    entry = record["samples"][0]
    assert entry["question"] == sample["prompt"][0]["content"] and entry["answer"] == sample["answer"]
    assert (tmp_path / "instruments" / entry["images"][0]).read_bytes().startswith(b"\x89PNG")
    ids = processor.tokenizer.convert_tokens_to_ids(entry["tokens"])

    def logps(model, with_image: bool) -> torch.Tensor:
        rows = plain_rows(model.eval(), processor, sample, ids, with_image)
        return torch.log_softmax(rows @ model.lm_head.weight.T, dim=-1).detach()

    student, teacher = ([logps(model, flag) for flag in (True, False)] for model in (trainer.student, tiny_teacher()))
    chosen = torch.tensor(ids)[:, None]

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(dim=-1)

    expected = {
        "vds": kl(*teacher),
        "student_vds": kl(*student),
        "standard": kl(student[0], teacher[0]),
        "gain": (student[0] - student[1]).gather(1, chosen)[:, 0],
        "teacher_gain": (teacher[0] - teacher[1]).gather(1, chosen)[:, 0],
    }
    assert set(entry["terms"]) == set(expected)
    for name, values in expected.items():
        assert entry["terms"][name] == pytest.approx(values.tolist(), abs=2e-4)


def test_a_student_of_nan_does_not_end_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_samples=2, geometry_every=1, eta=0.5)
    for weight in trainer.student.parameters():
        weight.data.fill_(math.nan)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    record = json.loads((tmp_path / "instruments" / "samples-000000.json").read_text())
    for sample in record["samples"]:
        assert sample["tokens"] and set(sample["terms"]["standard"]) == {None}
        assert None not in sample["terms"]["vds"]  # the teacher is whole
    assert (tmp_path / "instruments" / "geometry-000000.json").exists()


def test_pictures_are_kept_by_what_they_show(tmp_path: Path) -> None:
    processor = tiny_processor()
    for step, number in enumerate((0, 1, 0)):  # another question in the same place, and the first again
        sample = {"prompt": "what ?", "images": [tiny_image(number), tiny_image(number)]}
        write_samples(tmp_path, step, processor, [sample], [[1]], [{"vds": torch.ones(1)}], [None])
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("samples-*.json"))]
    images = [record["samples"][0]["images"] for record in records]
    assert images[0] == images[2] != images[1] and len(list(tmp_path.glob("*.png"))) == 2
    for number, (name, _) in enumerate(images[:2]):
        with Image.open(tmp_path / name) as kept:
            assert kept.tobytes() == tiny_image(number).convert("RGB").tobytes()


def tiny_teacher() -> torch.nn.Module:
    return tiny_model(1, hidden=48)


@pytest.mark.slow
def test_reinforcement_looks_too(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, save_samples=2, geometry_every=1, max_steps=1, alpha=0.3)
    trainer.train()
    for step in (0, 1):
        record = json.loads((tmp_path / "instruments" / f"geometry-{step:06d}.json").read_text())
        angles = record["parameters"]["all"]["angles"]
        assert all(value is None or 0 <= value <= 180 for value in angles.values())
        samples = json.loads((tmp_path / "instruments" / f"samples-{step:06d}.json").read_text())["samples"]
        assert len(samples) == 2


@pytest.mark.parametrize("options", [{"save_samples": 2, "preset": "opsd"}, {"geometry_every": 1}])
def test_self_distillation_has_no_teacher_of_the_same_prompt(tmp_path: Path, options: dict) -> None:
    """Of the student's own prompt its teacher says nothing: at the start it is the student itself."""
    name = next(iter(options))
    with pytest.raises(ConfigError, match=rf"^{name}={options[name]} needs a separate teacher .* privileged context"):
        make_self_trainer(tmp_path, **{"preset": "visual_opsd", **options})


@pytest.mark.parametrize("prior", ["frozen", "ema"])
def test_bins_of_terms_that_are_not_formed(tmp_path: Path, prior: str) -> None:
    trainer = make_trainer(tmp_path, log_terms_by_bin=2, prior=prior, gamma=0.0, lam=0.5, eta=0.5)
    loss_of(trainer, rollout(trainer))
    found = {name.partition("_bin_")[0] for name in trainer.open_metrics if "_bin_" in name}
    assert found == set(TERMS) - {"visual"}


def test_grpo_alone_has_no_teacher_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_samples needs a teacher that can score new answers"):
        grpo_trainer(tmp_path, alpha=0.0, save_samples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_terms_by_bin": 1}, "log_terms_by_bin must be >= 2 or left out, got 1"),
        ({"geometry_every": 0}, "geometry_every must be >= 1 or left out, got 0"),
        ({"save_samples": 65}, r"save_samples must lie in \[0, 64\], got 65"),
        ({"save_samples_every": 5}, "save_samples_every=5 needs save_samples, got 0"),
        ({"log_terms_by_bin": 10, "log_terms": False}, "log_terms_by_bin=10 needs log_terms=True"),
        ({"log_terms_by_bin": 10, "preset": "opd"}, "needs a preset with terms, which 'opd' has not"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VGSConfig(**trainer_options(tmp_path, **options))
