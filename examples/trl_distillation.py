"""VGS in an existing run of TRL's DistillationTrainer: the class is replaced by one with two methods.

python examples/trl_distillation.py --data questions.jsonl --learning_rate 1e-6
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import DistillationConfig, DistillationTrainer

from vgs import DataSource, load_samples, placeholder_ids, vgs_step


@dataclass
class Options:
    student: str = "Qwen/Qwen3-VL-2B-Instruct"
    teacher: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = "questions.jsonl"


class SteeredDistillation(DistillationTrainer):
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.asked = inputs  # the host keeps padded tokens alone, and shuffles them
        return {**super()._generate_and_score_completions(inputs), "asked": torch.arange(len(inputs))}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        samples = [self.asked[index] for index in inputs["asked"].tolist()]
        pairs = zip(inputs["completion_ids"], inputs["completion_mask"].bool(), strict=True)
        responses = [[ids[mask].tolist()] for ids, mask in pairs]
        # A mean over all responses of the optimizer step, by which the host does not divide again.
        loss = vgs_step(
            model, self.teacher_model, self.processing_class, samples, responses, "vgs", num_items=len(self.asked)
        ).loss
        return (loss, None) if return_outputs else loss


parser = HfArgumentParser((Options, DistillationConfig))
parser.set_defaults(output_dir="runs/trl_distillation", bf16=torch.cuda.is_available(), logging_steps=1)
options, arguments = parser.parse_args_into_dataclasses()

student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32)
# The host forbids the token of an image alone, and not that of a video.
arguments.generation_kwargs = {"suppress_tokens": placeholder_ids(student.config)}
trainer = SteeredDistillation(
    model=student,
    teacher_model=AutoModelForImageTextToText.from_pretrained(options.teacher),
    args=arguments,
    train_dataset=load_samples(DataSource(options.data)),
    processing_class=AutoProcessor.from_pretrained(options.student),
)
trainer.train()
trainer.save_model()
