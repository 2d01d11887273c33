"""VGS in TRL's GKDTrainer, which reads text alone: here answers are sampled and scored with their pictures.

python examples/trl_gkd.py --data questions.jsonl --lmbda 0.5 --learning_rate 1e-6
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl.experimental.gkd import GKDConfig, GKDTrainer

from vgs import DataSource, load_samples, respond, vgs_step


@dataclass
class Options:
    student: str = "Qwen/Qwen3-VL-2B-Instruct"
    teacher: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = "questions.jsonl"


class SteeredGKD(GKDTrainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        samples = inputs["samples"]  # the choice below is the host's, which then generates without pictures
        on_policy = random.random() <= self.lmbda
        if on_policy or self.seq_kd:
            sampling = {"max_new_tokens": self.args.max_new_tokens, "temperature": self.temperature}
            inputs["responses"] = respond(model if on_policy else self.teacher_model, processor, samples, **sampling)
        else:
            texts = [x["answer"] + processor.tokenizer.eos_token for x in samples]
            inputs["responses"] = [[ids] for ids in processor.tokenizer(texts, add_special_tokens=False).input_ids]
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        output = vgs_step(model, self.teacher_model, processor, inputs["samples"], inputs["responses"], "vgs")
        return (output.loss, output) if return_outputs else output.loss


parser = HfArgumentParser((Options, GKDConfig))
parser.set_defaults(output_dir="runs/trl_gkd", bf16=torch.cuda.is_available(), logging_steps=1)
parser.set_defaults(dataloader_drop_last=True)  # micro-batches of equal size: the mean of means is the mean of all
options, arguments = parser.parse_args_into_dataclasses()
processor = AutoProcessor.from_pretrained(options.student)
questions = load_samples(DataSource(options.data))
trainer = SteeredGKD(
    model=AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32),
    teacher_model=AutoModelForImageTextToText.from_pretrained(options.teacher),
    args=arguments,
    data_collator=lambda rows: {"samples": [questions[row["index"]] for row in rows]},
    train_dataset=Dataset.from_dict({"index": range(len(questions))}),  # the host takes no other class
    processing_class=processor.tokenizer,  # nor a processor
)
trainer.train()
trainer.save_model()
processor.save_pretrained(arguments.output_dir)
