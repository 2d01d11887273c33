"""GRPO runs that really sample: rollouts, evaluation, adapters, resume, several ranks, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from grpo_runs import brevity, common, grpo_trainer, options, script
from resume_worker import differences, everything
from tiny import save_tiny_checkpoint, tiny_model, tiny_samples

from vgs.cli import main as cli
from vgs.trainers.checkpoints import newest_complete_checkpoint
from vgs.trainers.grpo import VGSGRPOTrainer
from vgs.trainers.grpo_settings import VGSGRPOConfig


def sampling_trainer(tmp_path: Path, samples: int = 4, **changes) -> VGSGRPOTrainer:
    args = VGSGRPOConfig(**options(tmp_path, **changes))
    given = {**common(), "train_dataset": tiny_samples(samples), "eval_dataset": tiny_samples(5)}
    return VGSGRPOTrainer(teacher_model=tiny_model(1, hidden=48), args=args, reward_funcs=brevity, **given)


def test_images_are_never_sampled(tmp_path) -> None:
    trainer = sampling_trainer(tmp_path, max_completion_length=8, generation_kwargs={"suppress_tokens": [9]})
    suppressed = set(trainer.generation_config.suppress_tokens)
    assert suppressed == {*trainer.placeholder_ids, 9} and 9 not in trainer.placeholder_ids
    trainer.model.train()
    batch = trainer.next_micro_batch([sample for sample in tiny_samples(2) for _ in range(4)])
    assert not suppressed & {token for group in batch["groups"] for x in group.responses for token in x.tolist()}


class Engine:
    """Stands in for TRL's vLLM engine: expands every placeholder to four, as vLLM does, and answers 20."""

    def __init__(self, generation_kwargs: dict, **options) -> None:
        self.generation_kwargs, self.temperature, self.seen = generation_kwargs, 1.0, []

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts, images, num_generations, profiler=None) -> tuple:
        self.seen.append((num_generations, self.temperature, prompts))
        expanded = [[x for token in ids for x in [token] * (4 if token == 3 else 1)] for ids in prompts]
        return expanded, [[20] for _ in prompts], [[[-3.0]] for _ in prompts], None


def test_rollouts_of_vllm(tmp_path, monkeypatch) -> None:
    """Through the host's own branch, from its construction on."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    changes = {"use_vllm": True, "max_steps": 1, "vllm_importance_sampling_mode": "token_truncate"}
    samples = [x for x in tiny_samples(8) if x["images"][0].width == 32]
    args = VGSGRPOConfig(**options(tmp_path, generation_kwargs={"seed": 1}, per_device_eval_batch_size=2, **changes))
    given = {**common(), "train_dataset": samples, "eval_dataset": samples[:2]}
    trainer = VGSGRPOTrainer(teacher_model=tiny_model(1, hidden=48), args=args, reward_funcs=brevity, **given)
    engine = trainer.vllm_generation
    assert engine.generation_kwargs == {"seed": 1, "logit_bias": dict.fromkeys(trainer.placeholder_ids, -100.0)}
    trainer.train()
    trainer.evaluate()
    assert [x[:2] for x in engine.seen] == [(4, 1.0), (1, 0.0)]
    assert all(ids.count(3) == 1 for _, _, prompts in engine.seen for ids in prompts)
    assert trainer.state.log_history[0]["sampling/importance_sampling_ratio/mean"] > 0


def test_evaluation_is_greedy_and_takes_one_response(tmp_path) -> None:
    trainer = sampling_trainer(tmp_path, per_device_eval_batch_size=5)
    first, second = trainer.evaluate(), trainer.evaluate()
    same = ("eval_loss", "eval_reward", "eval_standard", "eval_completions/mean_length")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert (
        first["eval_accuracy"]
        == sum(trainer.scorer(text, x["answer"]) for text, x in zip(greedy(trainer), tiny_samples(5), strict=True)) / 5
    )
    sampled = sampling_trainer(tmp_path, per_device_eval_batch_size=4, eval_greedy=False)
    assert sampled.evaluate()["eval_loss"] != sampled.evaluate()["eval_loss"]


def greedy(trainer: VGSGRPOTrainer) -> list[str]:
    from vgs.evaluation.sampling import Sampling, sample_responses

    sampling = Sampling.from_settings(trainer.args, greedy=True)
    answers = sample_responses(trainer.model, trainer.processing_class, tiny_samples(5), sampling)
    return trainer._tokenizer.batch_decode(answers, skip_special_tokens=True)


def test_the_teacher_scores_a_sampled_batch_once(tmp_path, monkeypatch) -> None:
    trainer = grpo_trainer(tmp_path, num_iterations=3, max_steps=6)
    calls = []
    original = trainer.step_scorer.score_teacher
    monkeypatch.setattr(
        trainer.step_scorer, "score_teacher", lambda *args, **options: calls.append(args) or original(*args, **options)
    )
    trainer.train()
    assert len(calls) == 2


def test_alpha_0_forms_no_text_views_and_asks_no_teacher(tmp_path) -> None:
    args = VGSGRPOConfig(**options(tmp_path, alpha=0.0, max_steps=1))
    trainer = VGSGRPOTrainer(teacher_model="nowhere/at-all", args=args, reward_funcs=brevity, **common())
    trainer.train()
    assert "standard" not in trainer.state.log_history[0] and "entropy" in trainer.state.log_history[0]


def test_steps_of_one_generation_share_its_batch(tmp_path) -> None:
    """Two optimizer steps on one sampled batch: the second is off its policy, and both weigh as TRL's."""
    trainer = grpo_trainer(
        tmp_path, alpha=1.0, per_device_train_batch_size=4, steps_per_generation=2, loss_reduction="token"
    )
    inputs = []
    original = trainer.plan_passes
    trainer.plan_passes = lambda batch: inputs.append(original(batch)) or inputs[-1]
    trainer.train()
    first, second = inputs
    tokens = [sum(map(len, group.responses)) for batch in inputs for group in batch.groups]
    expected = 2 / sum(tokens)  # a step has half of the sampled batch, on average
    assert [float(x.weights[0][0]) for x in (first, second)] == pytest.approx([expected, expected])
    assert first.groups[0].prompt_ids.tolist() != second.groups[0].prompt_ids.tolist()


def test_an_adapter_learns(tmp_path) -> None:
    from peft import LoraConfig

    args = VGSGRPOConfig(**options(tmp_path, max_steps=1))
    trainer = VGSGRPOTrainer(
        teacher_model=tiny_model(1, hidden=48),
        args=args,
        reward_funcs=brevity,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        **common(),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.slow
def test_a_resumed_run_is_the_whole_run(tmp_path, alpha: float) -> None:
    changes = {
        "alpha": alpha,
        "max_steps": 8,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_eval_batch_size": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    whole = sampling_trainer(tmp_path, **changes)
    whole.train()
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-8"
    for step in (2, 6):
        again = sampling_trainer(tmp_path, **changes)
        torch.rand(3)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differences(everything(again), everything(whole)) == []


def test_scripted_responses_differ_and_some_never_end() -> None:
    """What the comparisons rest on."""
    from vgs.data.prompts import encode_groups

    trainer = common()
    groups = encode_groups(trainer["processing_class"], tiny_samples(2), [[[1]], [[1]]], [3])
    responses = script([group.prompt_ids.tolist() for group in groups for _ in range(4)], 1)
    assert len({tuple(x) for x in responses}) >= 5 and {x[-1] == 1 for x in responses} == {True, False}


@pytest.mark.slow
def test_the_command_line_trains_by_reward(tmp_path, capsys) -> None:
    import datasets

    rows = [
        {"question": x["prompt"][0]["content"], "answer": x["answer"], "images": x["images"]} for x in tiny_samples(4)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    part = {"path": str(tmp_path / "data")}
    config = {
        "trainer": "grpo",
        "student": {"path": str(save_tiny_checkpoint(tmp_path / "student", seed=0))},
        "teacher": {"path": str(save_tiny_checkpoint(tmp_path / "teacher", seed=1, hidden=48)), "dtype": "float32"},
        "data": {"train": part, "eval": {**part, "limit": 2}},
        "training": options(
            tmp_path / "run", rewards=["exact_match", "format"], reward_weights=[1.0, 0.5], max_steps=1
        ),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(path), "--alpha", "0.5", "--objective", "opd"]) == 0
    saved = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert (saved.alpha, saved.preset, saved.rewards) == (0.5, "opd", ["exact_match", "format"])
    assert "eval_rewards/boxed_format/mean" in json.loads((tmp_path / "run" / "eval_results.json").read_text())
    del config["teacher"]
    path.write_text(yaml.safe_dump(config))
    assert (
        cli.main(
            ["train", str(path), "--overwrite", "--alpha", "0", "--eval_greedy", "false", "--num_generations_eval", "2"]
        )
        == 0
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["train", str(path)])
    assert "needs teacher.path" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--alpha", "0", "--loss_type", "cispo"])
    assert "loss_type must be one of" in capsys.readouterr().err
