"""Rollouts: what is never sampled, greedy evaluation, vLLM, several responses to a prompt, accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import rows_read
from tiny import tiny_model, tiny_samples
from torch import nn
from trainers import make_trainer, rollout

from vgs import VGSTrainer
from vgs.trainers import rollouts
from vgs.trainers.rollouts import Questions, expand_images_once, forbid_tokens, greedy_decoding


def test_placeholders_are_suppressed_while_sampling(tmp_path: Path) -> None:
    student = tiny_model(0)
    forbidden = [student.config.image_token_id, student.config.video_token_id]
    forbidden += [student.config.vision_start_token_id, student.config.vision_end_token_id]
    head = nn.Linear(32, student.config.get_text_config().vocab_size)
    student.lm_head = head  # an untied head that would sample nothing but placeholders
    nn.init.zeros_(head.weight)
    head.bias.data = torch.where(torch.isin(torch.arange(len(head.bias)), torch.tensor(forbidden)), 50.0, 0.0)
    trainer = make_trainer(tmp_path, student=student, generation_kwargs={"suppress_tokens": [20]})
    sampled = torch.cat([x for group in rollout(trainer)["groups"] for x in group.responses])
    assert not torch.isin(sampled, torch.tensor([*forbidden, 20])).any()
    assert trainer.generation_config.suppress_tokens == sorted([*forbidden, 20])


class Engine:
    """Stands in for TRL's vLLM engine: expands every placeholder to ``pads``, as vLLM does, and answers 20."""

    def __init__(self, pads: int = 4) -> None:
        self.generation_kwargs = {"logit_bias": {3: -1.0}, "seed": 1}
        self.temperature, self.pads, self.sent = 1.0, pads, []

    def generate(self, prompts, images, num_generations, profiler=None) -> tuple:
        self.sent = prompts
        expanded = [[x for token in ids for x in [token] * (self.pads if token == 3 else 1)] for ids in prompts]
        return expanded, [[20] for _ in prompts], None, None


def test_vllm_gets_a_logit_bias_and_greedy_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.use_vllm, trainer.vllm_generation = True, Engine()
    forbid_tokens(trainer, trainer.placeholder_ids)
    options = trainer.vllm_generation.generation_kwargs
    assert options == {"seed": 1, "logit_bias": {3: -1.0, 4: -100.0, 5: -100.0, 6: -100.0}}
    with greedy_decoding(trainer):
        assert trainer.vllm_generation.temperature == 0.0
    assert trainer.vllm_generation.temperature == 1.0


def test_colocated_vllm_expands_images_once() -> None:
    prompts, images = [[5, 3, 3, 3, 3, 6, 20], [3, 3, 3, 3, 6, 3, 3, 3, 3]], [["picture"], ["one", "two"]]
    engine = Engine()
    expand_images_once(engine, lambda: [[5, 3, 6, 20], [3, 6, 3]])
    assert engine.generate(prompts=prompts, images=images, num_generations=1)[:2] == (prompts, [[20], [20]])
    assert engine.sent == [[5, 3, 6, 20], [3, 6, 3]]
    other = Engine(pads=6)
    expand_images_once(other, lambda: [[5, 3, 6, 20], [3, 6, 3]])
    with pytest.raises(RuntimeError, match="disagree about prompt 0: 9 tokens and 7"):
        other.generate(prompts=prompts, images=images, num_generations=1)


def test_a_vllm_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the host's own vLLM branch: what it passes and what it takes back."""
    trainer = make_trainer(tmp_path, samples=[x for x in tiny_samples(8) if x["images"][0].width == 32])
    engine = Engine()
    engine.sync_weights = lambda: None
    expand_images_once(engine, trainer.unexpanded_prompts)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine, -1
    batch = rollout(trainer)
    assert [x.tolist() for group in batch["groups"] for x in group.responses] == [[20]] * len(trainer.train_dataset)
    assert all(ids.count(3) == 1 for ids in engine.sent)
    assert all((group.prompt_ids == 3).sum() == 4 for group in batch["groups"])


def draw(trainer: VGSTrainer) -> list[list[int]]:
    groups = trainer.sample(tiny_samples(5))["groups"]
    return [response.tolist() for group in groups for response in group.responses]


def test_evaluation_is_greedy_and_training_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    assert draw(trainer) == draw(trainer)
    assert trainer.generation_config.do_sample
    trainer.model.train()
    assert draw(trainer) != draw(trainer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_responses_to_each_prompt(tmp_path: Path, accumulation: int) -> None:
    """From the sampler to the micro-batches: neighbours share a prompt, and each is sampled on its own."""
    trainer = make_trainer(
        tmp_path,
        num_generations=4,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        eta=1.0,
    )
    seen: list[dict] = []
    original = trainer.compute_loss

    def spy(model, inputs, **options):
        seen.append(inputs)
        return original(model, inputs, **options)

    trainer.compute_loss = spy
    trainer.train()
    assert [len(group.responses) for inputs in seen for group in inputs["groups"]] == [4] * 4
    assert len(seen) == 2 * accumulation
    prompts = {tuple(group.prompt_ids.tolist()) for inputs in seen for group in inputs["groups"]}
    assert len(prompts) > 2, "other prompts in the second step"
    assert any(len({tuple(x.tolist()) for x in group.responses}) > 1 for x in seen for group in x["groups"])


def test_evaluation_accuracy(tmp_path: Path) -> None:
    """5 samples with answers a b c d a, in batches of 2: the last batch counts as much as its one sample."""
    seen: list[tuple[str, str]] = []

    def scorer(text: str, gold: str) -> bool:
        seen.append((text, gold))
        return gold == "a"

    trainer = make_trainer(tmp_path, scorer=scorer, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(2 / 5)
    assert sorted(gold for _, gold in seen) == ["a", "a", "b", "c", "d"]
    assert all("<|" not in text for text, _ in seen)
    assert {"eval_loss", "eval_standard", "eval_vds_q70"} <= metrics.keys()


def test_every_eval_set_has_metrics_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scorer=lambda text, gold: gold == "right", max_steps=1, eval_strategy="steps")
    trainer.eval_dataset = {
        name: [{**sample, "answer": answer} for sample in tiny_samples(3)]
        for name, answer in (("one", "right"), ("two", "wrong"))
    }
    metrics = trainer.evaluate()
    assert (metrics["eval_one_accuracy"], metrics["eval_two_accuracy"]) == (1.0, 0.0)
    assert {"eval_one_loss", "eval_two_vds", "eval_one_completions/mean_length"} <= metrics.keys()
    assert not {"eval_accuracy", "eval_loss", "eval_vds"} & metrics.keys(), "none that would be the last set's"
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert "eval_two_accuracy" in logged and not {"eval_accuracy", "eval_vds"} & logged


def test_a_checkpoints_own_settings_do_not_change_rollouts(tmp_path: Path) -> None:
    """Of a published checkpoint's generation config only the end tokens count."""
    trainers = [make_trainer(tmp_path, student=tiny_model(0)) for _ in range(2)]
    trainers[1].model.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=1, typical_p=0.2)
    drawn = []
    for trainer in trainers:
        torch.manual_seed(0)
        drawn.append(draw(trainer))
    assert drawn[0] == drawn[1]
    assert trainers[1].model.generation_config.no_repeat_ngram_size == 1, "it is saved with the model as it was"


def test_samples_without_answers_do_not_count(tmp_path: Path) -> None:
    samples = tiny_samples(8)
    for sample in samples[2:]:
        sample["answer"] = None
    trainer = make_trainer(tmp_path, samples=samples, scorer=lambda text, gold: gold == "a", max_steps=2)
    trainer.train()
    logged = [x["accuracy"] for x in trainer.state.log_history[:2] if x.get("accuracy") is not None]
    assert sum(logged) / len(logged) == 0.5, "one right, one wrong, in one step or in two"
    trainer._metrics["train"].clear()
    trainer.train_dataset = samples[2:]
    rollout(trainer)
    assert "accuracy" not in trainer._metrics["train"]


def test_long_prompts_stay_in_an_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answered and scored, also where no pass of training could hold them."""
    samples = tiny_samples(3)
    samples[1]["prompt"] = [{"role": "user", "content": "what is the answer : " * 20}]
    samples[1]["answer"] = "long"
    options = {"max_prompt_length": 30, "max_tokens_per_pass": 80, "max_steps": 1}
    trainer = make_trainer(tmp_path, scorer=lambda text, gold: gold == "long", **options)
    metrics = trainer.evaluate(samples)
    assert metrics["eval_accuracy"] == pytest.approx(1 / 3)
    assert "1 prompts of an evaluation batch are longer than 30 tokens: answered all the same" in caplog.text
    trainer.train_dataset = samples
    with pytest.raises(ValueError, match="more than max_prompt_length=30"):
        rollout(trainer)


def test_prompts_over_the_limit_are_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_prompt_length=20)
    with pytest.raises(ValueError, match="more than max_prompt_length=20"):
        rollout(trainer)


def test_a_prompt_is_read_once_for_all_responses_to_it(tmp_path: Path) -> None:
    """With its images; and the responses are those of prompts that are repeated, which the host would ask."""
    trainer = make_trainer(tmp_path, num_generations=2, samples=[x for x in tiny_samples(4) for _ in range(2)])
    trainer.model.train()
    patches: list[int] = []
    tower = trainer.student.model.visual
    handle = tower.register_forward_hook(lambda module, inputs, output: patches.append(len(inputs[0])))
    inputs = list(trainer.train_dataset)
    torch.manual_seed(0)
    with rows_read(trainer.student) as seen:
        _, groups = rollouts.rollout(trainer, inputs, 2)
    handle.remove()
    longest = max(len(group.prompt_ids) for group in groups)
    assert seen[0] == (len(groups), longest) and set(seen[1:]) == {(len(inputs), 1)}
    assert sum(patches) == sum(len(group.images["pixel_values"]) for group in groups)
    questions = rollouts.encode_questions(trainer, inputs, 2)
    torch.manual_seed(0)
    repeated = trainer.host_rollout(Questions(questions.samples, questions.rows, 1))
    expected = Questions(questions.samples, questions.groups, 2).answered(
        repeated["completion_ids"], repeated["completion_mask"]
    )
    assert [[x.tolist() for x in group.responses] for group in groups] == [
        [x.tolist() for x in group.responses] for group in expected
    ]
