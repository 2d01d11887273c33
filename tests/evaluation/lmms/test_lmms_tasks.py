"""The seven tasks in lmms-eval 0.7.3 itself: rows, prompts, filters, scores, repeats, groups."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import RECORDED, Recorded
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string

from vgs.evaluation.benchmarks import harness
from vgs.evaluation.benchmarks.settings import EvalSettings

MANAGER = TaskManager(include_path=str(harness.TASKS))


class FromRecord(lmms):
    """A chat model that gives recorded responses, another one to each repetition, and keeps what it was asked."""

    is_simple = False

    def __init__(self, responses: dict[str, list[list[str]]]) -> None:
        super().__init__()
        self.responses, self.asked, self.generation = responses, {}, []

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        found, turn = [], {}
        for request in requests:
            _, doc_to_messages, generation, doc_id, task, split = request.args
            key = task, doc_id
            self.asked[key] = doc_to_messages(self.task_dict[task][split][doc_id])
            self.generation.append(generation)
            turn[key] = turn.get(key, -1) + 1
            found.append(GenerationResult(text=self.responses[task][doc_id][turn[key]]))
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


def evaluate(model: Any, tasks: list[str], repeats: int = 1, **options: Any) -> dict[str, Any]:
    """``simple_evaluate`` as the command line of ``harness.command`` calls it."""
    return simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=MANAGER,
        repeats=repeats,
        log_samples=True,
        process_docs_parallel=1,
        bootstrap_iters=0,
        **options,
    )


def responses(items: tuple[Recorded, ...], repeats: int) -> tuple[list[list[str]], list[list[float]]]:
    """As many responses to each row, right and wrong ones in turn, and their scores."""
    given, worth = [], []
    for item in items:
        pairs = [
            pair for both in zip(item.right, item.wrong, strict=False) for pair in zip(both, (1.0, 0.0), strict=True)
        ]
        pairs = (pairs * repeats)[:repeats]
        given.append([text for text, _ in pairs])
        worth.append([score for _, score in pairs])
    return given, worth


def test_this_is_the_version_that_was_read() -> None:
    assert version("lmms_eval") == harness.TESTED


@pytest.mark.parametrize("name", RECORDED)
def test_every_repetition_is_asked_and_scored(name: str) -> None:
    given, worth = responses(RECORDED[name], 3)
    model = FromRecord({f"vgs_{name}": given})
    found = evaluate(model, [f"vgs_{name}"], repeats=3)
    samples = sorted(found["samples"][f"vgs_{name}"], key=lambda sample: sample["doc_id"])
    assert [sample["scores"] for sample in samples] == worth
    assert found["results"][f"vgs_{name}"]["acc,all"] == pytest.approx(sum(map(sum, worth)) / sum(map(len, worth)))
    for number, item in enumerate(RECORDED[name]):
        (message,) = model.asked[f"vgs_{name}", number]
        texts = [part.get("text", "[picture]") for part in message["content"]]
        assert texts.count("[picture]") == item.asked.count("[") - item.asked.count("[picture")
        assert all(part["url"].mode == "RGB" for part in message["content"] if part["type"] == "image")
    assert all(x["max_new_tokens"] == 2048 and x["temperature"] == 0 for x in model.generation)


def test_a_single_response_is_scored() -> None:
    name = "mathvision"
    given, worth = responses(RECORDED[name], 1)
    found = evaluate(FromRecord({f"vgs_{name}": given}), [f"vgs_{name}"])
    assert [sample["scores"] for sample in found["samples"][f"vgs_{name}"]] == worth


def test_generation_settings_reach_the_model() -> None:
    name = "logicvista"
    model = FromRecord({f"vgs_{name}": responses(RECORDED[name], 1)[0]})
    settings = EvalSettings(model="x", max_new_tokens=77, temperature=0.7, top_p=0.9, top_k=5)
    line = harness.command("python", settings, f"vgs_{name}", Path("out"), repeats=16)
    evaluate(model, [f"vgs_{name}"], gen_kwargs=line[line.index("--gen_kwargs") + 1])
    expected = {"max_new_tokens": 77, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0}
    assert all(expected.items() <= found.items() for found in model.generation)


def test_the_group_is_the_plain_mean() -> None:
    given = {f"vgs_{name}": responses(items, 1)[0] for name, items in RECORDED.items()}
    given["vgs_mathvision"] = [[item.wrong[0]] for item in RECORDED["mathvision"]]
    found = evaluate(FromRecord(given), ["vgs_paper"])
    assert found["results"]["vgs_paper"]["acc,all"] == pytest.approx(6 / 7)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_logs_are_scored_by_the_class_from_log(name: str, tmp_path: Path) -> None:
    """lmms-eval's own way to score responses again, with the question as a plain text."""
    given, worth = responses(RECORDED[name], 1)
    logs = [{"doc_id": number, "resps": [texts]} for number, texts in enumerate(given)]
    record = {"args": {"model": "x", "model_args": "", "limit": None}, "model_configs": {"task": f"vgs_{name}"}}
    (tmp_path / "log.json").write_text(json.dumps({**record, "logs": logs}))
    found = evaluate("from_log", [f"vgs_{name}"], model_args=f"logs={tmp_path}")
    assert [sample["scores"] for sample in found["samples"][f"vgs_{name}"]] == worth


def test_the_model_that_always_says_a() -> None:
    found = evaluate("dummy", ["vgs_visualpuzzles"], model_args="response=A")
    assert [sample["scores"] for sample in found["samples"]["vgs_visualpuzzles"]] == [[1.0], [0.0]]


def test_arguments_of_vllm_are_read_back_whole() -> None:
    settings = EvalSettings(model="org/name", backend="vllm", processor={"min_pixels": 1, "max_pixels": 1024})
    line = harness.command("python", settings, "vgs_mathvision", Path("out"), gpus=2)
    found = simple_parse_args_string(line[line.index("--model_args") + 1])
    assert json.loads(found.pop("mm_processor_kwargs")) == {"min_pixels": 1, "max_pixels": 1024}
    assert found == {
        "model": "org/name",
        "dtype": "auto",
        "trust_remote_code": False,
        "max_new_tokens": 2048,
        "tensor_parallel_size": 2,
    }


def test_repeats_without_our_filter_score_the_first_response_alone(tmp_path: Path) -> None:
    """Why the tasks have a filter: with lmms-eval's own, ``--repeats 3`` neither scores nor reports the other two."""
    text = (harness.TASKS / "logicvista.yaml").read_text().replace("vgs_logicvista", "plain_logicvista")
    shared = (harness.TASKS / "_shared_yaml").read_text()
    start, end = shared.index("filter_list:"), shared.index("reasoning_tags:")
    (tmp_path / "_shared_yaml").write_text(shared[:start] + shared[end:])
    (tmp_path / "plain.yaml").write_text(text)
    given = [[r"\boxed{D}", "no", "no"], [r"\boxed{A, C}", "no", "no"]]
    found = simple_evaluate(
        model=FromRecord({"plain_logicvista": given}),
        tasks=["plain_logicvista"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        repeats=3,
        log_samples=True,
        bootstrap_iters=0,
    )
    numbers = found["results"]["plain_logicvista"]
    assert numbers["acc,none"] == 1.0
    assert "acc_expected_accuracy,none" not in numbers
