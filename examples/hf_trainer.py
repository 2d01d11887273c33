"""VGS in the Trainer of transformers: one method is replaced.

python examples/hf_trainer.py --data questions.jsonl --learning_rate 1e-6
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

from vgs import DataSource, load_samples, respond, vgs_step


@dataclass
class Options:
    student: str = "Qwen/Qwen3-VL-2B-Instruct"
    teacher: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = "questions.jsonl"
    max_new_tokens: int = 1024


class SteeredTrainer(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        samples = inputs["samples"]
        responses = respond(model, processor, samples, max_new_tokens=options.max_new_tokens)
        # Without labels the host takes the mean over micro-batches: of equal size, that is the mean over all responses.
        output = vgs_step(model, teacher, processor, samples, responses, "vgs")
        return (output.loss, output) if return_outputs else output.loss


parser = HfArgumentParser((Options, TrainingArguments))
# remove_unused_columns: samples come as they are. dataloader_drop_last: micro-batches of equal size.
parser.set_defaults(output_dir="runs/hf_trainer", remove_unused_columns=False, dataloader_drop_last=True)
parser.set_defaults(bf16=torch.cuda.is_available(), logging_steps=1)
options, arguments = parser.parse_args_into_dataclasses()

student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher).to(arguments.device).eval()
processor = AutoProcessor.from_pretrained(options.student)
trainer = SteeredTrainer(
    model=student,
    args=arguments,
    train_dataset=load_samples(DataSource(options.data)),
    data_collator=lambda samples: {"samples": samples},
    processing_class=processor,
)
trainer.train()
trainer.save_model()
