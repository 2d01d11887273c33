"""The hosts' private methods: what is expected of them, what happens where they have moved, and who overrides them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from grpo_runs import common, options
from selves import make_self_trainer
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import make_trainer
from trl import DistillationTrainer, GRPOTrainer

import vgs.trainers
from vgs import SelfDistillationTrainer, VGSConfig, VGSGRPOConfig, VGSGRPOTrainer, VGSTrainer
from vgs.errors import ConfigError
from vgs.trainers.collapse_watch import SteeringState
from vgs.trainers.host_hooks import SIGNATURES, HostHooks, check_attributes, check_signatures
from vgs.trainers.prior import Prior
from vgs.trainers.resume import ExactResume

VERSIONS = f"trl {trl.__version__} with transformers {transformers.__version__}"
HOSTS = [DistillationTrainer, GRPOTrainer]
TRAINERS = {VGSTrainer: DistillationTrainer, SelfDistillationTrainer: DistillationTrainer, VGSGRPOTrainer: GRPOTrainer}


# ---- composition


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda x: x.__name__)
def test_a_trainer_is_its_hooks_in_front_of_its_host(trainer: type) -> None:
    host = TRAINERS[trainer]
    ours = [cls for cls in trainer.__mro__ if cls not in host.__mro__]
    expected = [SelfDistillationTrainer, VGSTrainer] if trainer is SelfDistillationTrainer else [trainer]
    assert ours == [*expected, HostHooks]
    assert trainer.__mro__[len(ours)] is host


def test_a_trainer_holds_its_parts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, prior="frozen")
    assert isinstance(trainer.prior, Prior) and isinstance(trainer.resume, ExactResume)
    assert trainer.steering in trainer.callback_handler.callbacks and isinstance(trainer.steering, SteeringState)
    assert make_trainer(tmp_path).prior is None
    assert make_self_trainer(tmp_path).copy.source == "ema"


def private_methods(tree: ast.Module) -> dict[str, set[str]]:
    """class -> its methods with one leading underscore, of a file."""
    return {
        node.name: {x.name for x in node.body if isinstance(x, ast.FunctionDef) and x.name.startswith("_")}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def test_one_file_overrides_private_methods() -> None:
    """Of all classes in this room, only ``HostHooks`` has a private method's name from a host, and all are checked."""
    found = {}
    for path in Path(vgs.trainers.__file__).parent.glob("*.py"):
        for name, methods in private_methods(ast.parse(path.read_text())).items():
            if taken := {x for x in methods if any(hasattr(host, x) for host in HOSTS) and not x.startswith("__")}:
                found[name] = taken
    assert set(found) == {"HostHooks"}
    assert found["HostHooks"] <= set().union(*SIGNATURES.values())


# ---- the check


@pytest.mark.parametrize("host", HOSTS, ids=lambda x: x.__name__)
def test_the_installed_hosts_are_as_recorded(host: type) -> None:
    check_signatures(host)


class Renamed(DistillationTrainer):
    def _prepare_inputs(self, generation_batch: Any, prefetched: Any = None) -> Any:
        return super()._prepare_inputs(generation_batch)


class Gone(GRPOTrainer):
    _tokenize_prompts = None


class Loop(GRPOTrainer):
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(*args, **kwargs)


class Longer(GRPOTrainer):
    """Image fields of one more family: all are passed on."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, batch_size: Any = None, new: Any = 0
    ) -> Any: ...


class Shorter(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Any, attention_mask: Any) -> Any: ...


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (
            Renamed,
            f"DistillationTrainer._prepare_inputs is expected to take (self, generation_batch), but in {VERSIONS} it "
            "takes (self, generation_batch, prefetched); install versions that are known to fit: trl 1.14.2 to 1.16.0 "
            "and transformers 5.17 to 5.24.",
        ),
        (
            Gone,
            f"GRPOTrainer._tokenize_prompts is expected to take (self, prompts), but in {VERSIONS} it is missing;",
        ),
        (Loop, f", but in {VERSIONS} it takes (self, *args, **kwargs);"),
        (Shorter, "logits_to_keep, ...) or (self, model, *args, batch_size, compute_aux_loss, **kwargs), but in"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_host_that_has_changed_is_refused_with_one_sentence(host: type, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_signatures(host)
    assert message in str(error.value)


def test_further_image_fields_are_no_change() -> None:
    check_signatures(Longer)


class LaterTrainer(HostHooks, Renamed):
    pass


class LaterGRPOTrainer(VGSGRPOTrainer):
    pass


def test_a_trainer_checks_its_host_before_it_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"DistillationTrainer\._prepare_inputs is expected"):
        LaterTrainer(model=str(tmp_path / "missing"))
    monkeypatch.setattr(GRPOTrainer, "_tokenize_prompts", None)
    with pytest.raises(ConfigError, match=r"GRPOTrainer\._tokenize_prompts is expected .* it is missing"):
        LaterGRPOTrainer(**common(), args=VGSGRPOConfig(**options(tmp_path, alpha=0.0)))
    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", lambda self: None)
    with pytest.raises(ConfigError, match=r"DistillationTrainer\._save_checkpoint is expected"):
        VGSTrainer("no/student", "no/teacher", VGSConfig(**trainer_options(tmp_path)))


def test_private_attributes_are_there(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    check_attributes(trainer)
    del trainer._buffered_inputs
    with pytest.raises(ConfigError, match=f"VGSTrainer is expected to have _buffered_inputs from trl, but {VERSIONS}"):
        check_attributes(trainer)


# ---- what the hooks add


def test_gold_answers_reach_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer._set_signature_columns_if_needed()
    assert "answer" in trainer._signature_columns and "prompt" in trainer._signature_columns
    trainer = make_self_trainer(tmp_path)
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns[-1].startswith("privileged") and "answer" in trainer._signature_columns


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_are_repeated_in_a_row(tmp_path: Path, count: int) -> None:
    trainer = make_trainer(tmp_path, num_generations=count, gradient_accumulation_steps=2)
    order = list(trainer._get_train_sampler())
    assert len(order) == 8 * 2 * count, "each generation batch of 8 once for every micro-batch"
    assert order[:8] == order[8:16], "the same for the second micro-batch"
    assert order[:8:count] == order[count - 1 : 8 : count], "neighbours are the same sample"
    assert len(set(order[:8])) == 8 // count


def test_a_streamed_dataset_has_one_response_to_each_prompt(tmp_path: Path) -> None:
    import datasets

    stream = datasets.Dataset.from_list([{k: x[k] for k in ("prompt", "images")} for x in tiny_samples(4)])
    arguments = {"model": tiny_model(0), "teacher_model": tiny_model(1), "processing_class": tiny_processor()}
    options = trainer_options(tmp_path, max_steps=1, num_generations=2)
    with pytest.raises(ConfigError, match="num_generations=2 needs a dataset with a length, got IterableDataset"):
        VGSTrainer(args=VGSConfig(**options), train_dataset=stream.to_iterable_dataset(), **arguments)
