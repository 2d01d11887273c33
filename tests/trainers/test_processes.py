"""DDP, FSDP2 and ZeRO-3 through accelerate: whatever the ranks hold, the weights are those of a single process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from covering import slow_beyond
from grpo_runs import RUNS as GRPO_RUNS
from grpo_runs import grpo_trainer, weights
from launch import SUPPORT, launch_once, torchrun, wanted
from processes import CASES, CONFIGS, QUICK, Case, launch_environment, parse_launch, run
from tiny import tiny_model
from trainers import make_trainer, pair_loss

from vgs.models.forward import fused_loss

ENGINES = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "fsdp": ("FSDP", "FSDPQwen3VLForConditionalGeneration"),
    "zero": ("DEEPSPEED", "DeepSpeedEngine"),
}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
RUNNABLE = [name for name, case in CASES.items() if case.engine != "zero" or HAS_DEEPSPEED]


def ranks_of(name: str) -> int:
    return CASES[name].ranks if name in CASES else 2


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, Any]]]:
    """What every rank of a case reports. All selected cases with the same number of ranks share a launch; a rank
    that hangs prints its stacks and fails."""
    names = wanted(request)

    def read(name: str) -> list[dict[str, Any]]:
        ranks = ranks_of(name)

        def launch(folder: Path) -> None:
            chosen = [other for other in names if ranks_of(other) == ranks]
            torchrun(SUPPORT / "processes.py", ranks, str(folder), *chosen, timeout=600, DS_ACCELERATOR="cpu")

        folder = launch_once(tmp_path_factory, f"ranks{ranks}", launch)
        return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(ranks)]

    return read


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Any]:
    """The trainer of the same run in one process; cases that differ in their engine alone share it."""
    folder = tmp_path_factory.mktemp("single")
    finished: dict[str, Any] = {}

    def get(case: Case) -> Any:
        key = repr((case.responses, sorted(case.settings.items()), case.samples, case.tie, case.half))
        if key not in finished:
            finished[key] = run(case, folder, single=True)
        return finished[key]

    return get


@pytest.mark.parametrize("name", slow_beyond(QUICK, (name for name in RUNNABLE if not CASES[name].half)))
def test_ranks_equal_one_process(name: str, reports: Any, single: Any) -> None:
    case = CASES[name]
    ranks, one = reports(name), single(case)
    assert [report["engine"] for report in ranks] == [ENGINES[case.engine]] * case.ranks
    start = tiny_model(0, tie=case.tie).state_dict()
    expected = one.model.state_dict()
    assert ranks[0]["weights"].keys() == expected.keys()
    assert all((expected[key] - start[key]).abs().max() > 1e-5 for key in start if "visual" in key or "head" in key)
    for report in ranks:
        assert report["ratios"] == pytest.approx(one.steering.ratios, rel=1e-4)
        for key, value in report["weights"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    names = ["loss", "grad_norm", "eta"]
    if case.samples != "silent":  # there a response that is not trained on is still scored
        names.append("accuracy")
    if case.split[1] == 1:  # the host logs the mean over micro-batches
        names += ["standard", "visual", "language", "vds", "student_vds", "entropy", "vds_q40", "vds_q70"]
    bins = case.settings.get("log_terms_by_bin", 0)
    names += [f"{term}_bin_{number}" for term in ("standard", "vds") for number in range(bins)]
    for theirs, ours in zip(ranks[0]["logs"][:2], one.state.log_history[:2], strict=True):
        assert ("gate" in theirs) == ("gate" in ours)  # not in steps without the language term
        logged = [*names, "gate"] if "gate" in ours and "standard" in names else names
        assert {key: theirs[key] for key in logged} == pytest.approx({key: ours[key] for key in logged}, rel=1e-4)


@pytest.mark.parametrize("name", slow_beyond(QUICK, RUNNABLE))
def test_cases_are_what_they_say(name: str, reports: Any) -> None:
    """The ranks differ in what the case is about."""
    case = CASES[name]
    notes = [report["notes"] for report in reports(name)]  # a list of micro-batches for every rank
    together = list(zip(*notes, strict=True))
    parameters = sum(p.numel() for p in tiny_model(0, tie=case.tie).parameters())
    most = parameters if case.engine == "ddp" else 0.8 * parameters
    assert all(note["held"] <= most for note in notes[0]), "the student is sharded where its engine shards"
    assert all(len({len(note["passes"]) for note in ranks}) == 1 for ranks in together), "as many passes everywhere"
    if case.samples == "mixed":
        assert any(len({note["images"] for note in ranks}) == 2 for ranks in together), "images on one rank alone"
    if case.samples == "silent":
        assert all(note["tokens"] == 0 for note in notes[-1]) and all(note["tokens"] for note in notes[0])
    if "max_tokens_per_pass" in case.settings:
        assert any(0 in note["passes"] for ranks in together for note in ranks), "a pass without responses"
    if case.settings["vds_scope"] == "ranks":
        measured = [[note["limits"] for note in ranks if note["limits"] and note["tokens"]] for ranks in together]
        assert all(limits == found[0] for found in measured for limits in found), "one threshold for all ranks"


@pytest.mark.parametrize("name", ["fsdp_half"])
def test_mixed_precision_rounds_neither_weights_nor_thresholds(name: str, reports: Any, single: Any) -> None:
    """FSDP2 rounds what passes through the model's wrapper; the loss, its thresholds and its terms do not."""
    ranks, one = reports(name), single(CASES[name])
    rounded = [torch.tensor(note["limits"]).bfloat16().tolist() for note in ranks[0]["notes"]]
    assert [note["limits"] for note in ranks[0]["notes"]] != rounded
    for report in ranks:
        assert report["dtypes"] == {torch.float32}
    for theirs, ours in zip(ranks[0]["logs"][:2], one.state.log_history[:2], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.02)


@pytest.mark.parametrize("name", ["grpo_mixed", pytest.param("grpo_alone", marks=pytest.mark.slow)])
def test_two_ranks_reinforce_as_one_process_does(tmp_path: Path, name: str, reports: Any) -> None:
    one = grpo_trainer(tmp_path, **GRPO_RUNS[name.removeprefix("grpo_")])
    one.train()
    two = reports(name)[0]
    for key, value in weights(one).items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-4, atol=2e-6, msg=key)
    logs = [[entry for entry in x if "loss" in entry] for x in (two["logs"], one.state.log_history)]
    names = ["reward", "reward_std", "entropy", "clip_ratio/region_mean", "clip_ratio/high_max", "policy"]
    for entry, other in zip(*logs, strict=True):
        expected = {key: other[key] for key in names if key in other}
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["sharded"])
def test_a_sharded_student_gets_the_same_gradients(name: str, reports: Any) -> None:
    student = tiny_model(0, tie=False)
    pair_loss(student).backward()
    gathered = reports(name)[0]
    assert gathered.keys() == {key for key, p in student.named_parameters() if p.grad is not None}
    for key, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gathered[key], parameter.grad, rtol=1e-4, atol=1e-6)
    assert gathered["lm_head.weight"].abs().max() > 0


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configs(config: Path) -> None:
    nodes = config.stem.endswith("_nodes")
    machine = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1"] if nodes else []
    settings = parse_launch(config, *machine)
    assert (settings.num_machines, settings.machine_rank) == ((2, 1) if nodes else (1, 0))
    assert settings.num_processes == {"one_gpu": 1}.get(config.stem, 8 * settings.num_machines)
    environment = launch_environment(config, *machine)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ("ACCELERATE_USE_FSDP" in environment) == config.stem.startswith("fsdp2")
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == config.stem.startswith("zero3")
    if nodes:  # the same engine as on one machine
        alone = launch_environment(config.with_stem(config.stem.removesuffix("_nodes")))
        alone |= {name: value for name, value in environment.items() if name.endswith("DS_FIELDS")}  # names of keys
        assert environment == alone


def test_zero3_gathers_both_heads_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of ZeRO-3, with DeepSpeed itself imitated."""
    trainer = make_trainer(tmp_path, max_tokens_per_pass=80, lam=0.5, eta=1.0)
    model, teacher = trainer.model, trainer.teacher_model
    gathered, inside, lost, backward, read = [], [False], [], [], []

    class Watched(dict):
        """DeepSpeed learns in this way that a parameter is needed in the backward."""

        def __getitem__(self, name: str) -> Any:
            value = super().__getitem__(name)
            read.append((id(value), inside[0]))
            return value

    @contextmanager
    def gather(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        gathered.append({id(p) for p in parameters})
        inside[0] = True
        yield
        inside[0] = False

    def fused(*args: Any, **options: Any) -> Any:
        lost.append(inside[0])
        return fused_loss(*args, **options)

    batch = trainer.sample(list(trainer.train_dataset)[:4])
    for parameter in (*model.parameters(), *teacher.parameters()):
        parameter.ds_status = "sharded"
    status = SimpleNamespace(AVAILABLE="whole")
    for name, content in {
        "deepspeed": {"zero": SimpleNamespace(GatheredParameters=gather), "DeepSpeedEngine": type("Engine", (), {})},
        "deepspeed.runtime": {},
        "deepspeed.runtime.zero": {},
        "deepspeed.runtime.zero.partition_parameters": {"ZeroParamStatus": status},
    }.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("vgs.objectives.definitions.fused_loss", fused)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.DEEPSPEED)
    state = trainer.accelerator.gradient_state
    monkeypatch.setattr(
        trainer.accelerator,
        "backward",
        lambda loss, **options: backward.append((options, state.sync_gradients, loss.requires_grad)),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    heads = [id(module.get_output_embeddings().weight) for module in (model, teacher)]
    model.lm_head._parameters = Watched(model.lm_head._parameters)
    inputs = trainer.with_teacher(batch)
    assert gathered and all(group == {heads[1]} for group in gathered)
    gathered.clear()
    loss = trainer.compute_loss(model, inputs)
    passes = len(gathered) // 2
    assert passes > 1 and all(one | two == set(heads) for one, two in zip(gathered[::2], gathered[1::2], strict=True))
    assert read.count((heads[0], False)) == passes, "read as an attribute before it is gathered"
    assert lost == [True] * passes, "the loss runs while the heads are whole"
    assert backward == [({"scale_wrt_gas": False}, False, True)] * (passes - 1), "no pass but the last is a step"
    assert state.sync_gradients and loss.requires_grad, "the last pass is left to the host"
