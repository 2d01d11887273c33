"""Short runs of TRL's GRPO trainer, of ours and of the distillation trainer on the same scripted responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from trl import GRPOConfig, GRPOTrainer

from vgs import VGSConfig, VGSTrainer
from vgs.evaluation.rewards import exact_match
from vgs.trainers.grpo import VGSGRPOTrainer, as_dataset
from vgs.trainers.grpo_settings import VGSGRPOConfig

GENERATIONS = 4
#: A step is the gradient, unclipped.
PLAIN_SGD = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def script(prompt_ids: list[list[int]], end: int) -> list[list[int]]:
    """Responses of 1 to 5 tokens that depend on the prompt and their place in its group; some never end."""
    responses = []
    for index, ids in enumerate(prompt_ids):
        key = sum(position * token for position, token in enumerate(ids)) + 7 * (index % GENERATIONS)
        words = [8 + (key * step) % 20 for step in range(1, 2 + key % 5)]
        responses.append(words if key % 6 == 5 else [*words, end])
    return responses


class ScriptedSampling:
    """In front of a GRPO trainer; the sampler's log-probabilities are made up where vLLM would give some."""

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: Any,
        multimodal_fields: dict,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        responses = script(prompt_ids, self._tokenizer.eos_token_id)
        if not self.use_vllm:
            return responses, None
        return responses, [[-2.5 - 0.1 * (token % 7) for token in response] for response in responses]


class ScriptedTRL(ScriptedSampling, GRPOTrainer):
    pass


class ScriptedGRPO(ScriptedSampling, VGSGRPOTrainer):
    pass


class ScriptedDistillation(VGSTrainer):
    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> list[list[int]]:
        return script(prompt_ids, self._tokenizer.eos_token_id)


def brevity(completions: list, **columns: Any) -> list[float | None]:
    """Fewer words, more reward; nothing to say of some."""
    counts = [len(completion[-1]["content"].split()) for completion in completions]
    return [None if count == 3 else -0.5 * count for count in counts]


def options(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Two steps on two prompts with four responses each."""
    batch = {"per_device_train_batch_size": 8, "num_generations": GENERATIONS}
    return trainer_options(tmp_path, **{**batch, **PLAIN_SGD, **changes})


def common(seed: int = 0) -> dict[str, Any]:
    samples = as_dataset(tiny_samples(4))
    return {"model": tiny_model(seed), "train_dataset": samples, "processing_class": tiny_processor()}


def trl_trainer(tmp_path: Path, **changes: Any) -> ScriptedTRL:
    args = {name: value for name, value in options(tmp_path, **changes).items() if name != "loss_backend"}
    return ScriptedTRL(reward_funcs=[exact_match, brevity], args=GRPOConfig(**args), **common())


def grpo_trainer(tmp_path: Path, **changes: Any) -> ScriptedGRPO:
    """Without a teacher for ``alpha=0``."""
    args = VGSGRPOConfig(**options(tmp_path, **changes))
    teacher = None if args.alpha == 0 else tiny_model(1, hidden=48)
    return ScriptedGRPO(teacher_model=teacher, reward_funcs=[exact_match, brevity], args=args, **common())


def distillation_trainer(tmp_path: Path, **changes: Any) -> ScriptedDistillation:
    args = VGSConfig(**options(tmp_path, eta=1.0, **changes))
    return ScriptedDistillation(teacher_model=tiny_model(1, hidden=48), args=args, **common())


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


#: Settings of the runs that two ranks must do as one process does.
RUNS = {
    "mixed": {"alpha": 0.3, "lam": 0.5, "vds_scope": "trajectory", "loss_type": "dapo", "num_iterations": 2},
    "alone": {"alpha": 0.0, "loss_type": "grpo", "max_tokens_per_pass": 75, "max_prompt_length": 30},
}
