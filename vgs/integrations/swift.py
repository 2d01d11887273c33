"""VGS in ms-swift 4.6: its GKD trainer with our loss; swift samples, encodes, loads the teacher and saves.

``swift rlhf --rlhf_type gkd --external_plugins configs/hosts/swift/vgs_plugin.py``; see docs/hosts.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from swift.rlhf_trainers.gkd_trainer import GKDTrainer
from swift.rlhf_trainers.utils import encode_sample
from swift.trainers.trainer_factory import TrainerFactory
from torch import Tensor, nn

from ..data.prompts import anchor_group
from ..errors import ConfigError
from ..models.families import placeholder_ids
from ..models.tokenizers import load_tokenizer
from .models import check_models
from .options import read_options
from .rows import host_row, with_token_types, words_alone
from .signatures import check_signatures
from .step import HostRows, HostStep, Scored, sums

#: What is overridden or called of ms-swift, as this version has it.
KNOWN_VERSION = "4.6.0"
SIGNATURES = {
    GKDTrainer._prepare_batch_inputs: "self, samples",
    GKDTrainer.compute_loss: "self, model, inputs, return_outputs, num_items_in_batch",
    GKDTrainer.split_by_mini_batches: "self, samples",
    GKDTrainer._template_context: "self, template, inputs, max_length, mode",
    encode_sample: "sample, template, encode_prompt_only",
}
IGNORED = -100  # the label of tokens that are not the student's
IMAGE_MARK = "<image>"  # in swift's messages


@dataclass(frozen=True)
class MicroBatch:
    """What ``compute_loss`` is given.

    Attributes:
        scored: the whole generation batch, as the teacher has read it.
        rows: numbers of this micro-batch's rows.
        items: what the loss of its optimizer step is the mean over, on all ranks.
    """

    scored: Scored
    rows: list[int]
    items: float


class VGSTrainer(GKDTrainer):
    """swift's on-policy distillation with the options of ``vgs.integrations.options``, but for the teacher's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As swift's trainer.

        Raises:
            ConfigError: a version of swift whose methods have other parameters, a wrong option, a teacher behind a
                server, none, or one of other tokens, or a swift option that VGS does not go with.
        """
        check_signatures("ms-swift", KNOWN_VERSION, SIGNATURES)
        options = read_options()
        if options.policy_coefficient or options.teacher:
            name = "teacher" if options.teacher else "policy_coefficient"
            raise ConfigError(f"{name} must be left out with swift, which has --teacher_model and no policy loss here.")
        super().__init__(*args, **kwargs)
        if self.use_teacher_api or self.teacher_model is None:
            raise ConfigError("teacher_model must be a local model: VGS needs the teacher's hidden states.")
        for name, wrong in (
            ("sequence_parallel_size", self.template.sequence_parallel_size > 1),
            ("padding_free", self.template.padding_free),
            ("use_liger_kernel", self.use_liger_gkd_loss),
        ):
            if wrong:
                raise ConfigError(f"{name} must be left out with VGS, which packs its own rows and has its own loss.")
        self.model_accepts_loss_kwargs = False  # the host divides by its accumulation steps, whatever the model takes
        student, teacher = (self.accelerator.unwrap_model(x) for x in (self.model, self.teacher_model))
        processor = self.template.processor
        self.placeholders = placeholder_ids(student.config)
        _forbid(student, self.placeholders)
        preset, objective = options.resolved()
        check_models(
            self.model,
            self.teacher_model,
            processor,
            needs_images=preset.needs_text(objective),
            vocab_size=options.vocab_size,
            # swift has loaded the model's own code from this folder already, where there is some.
            teacher_tokenizer=load_tokenizer({"path": teacher.model_dir, "trust_remote_code": True}),
            template_options=options.template_options,
        )
        anchor = None
        if self.accelerator.num_processes > 1:
            anchor = anchor_group(processor, self.placeholders, self.accelerator.device, **options.template_options)
        self.step = HostStep(options, anchor, self.accelerator.autocast)

    def host_rows(self, samples: Sequence[Any]) -> HostRows:
        """Sampled responses in both views, as swift's template encodes them.

        Args:
            samples: swift's, with the ids of their responses.

        Raises:
            ConfigError: a sample whose views have other responses, or see ``host_row``.
        """
        model, rows, live = self.accelerator.unwrap_model(self.model), [], []
        with self._template_context(self.template):
            for number, sample in enumerate(samples):
                prompt, response, mask, fields = _parts(encode_sample(sample, self.template))
                text_prompt, text_response, _, _ = _parts(encode_sample(_without_images(sample), self.template))
                name = f"sample {number}"
                if not torch.equal(response, text_response):
                    raise ConfigError(f"{name}: swift's template encodes another response without the images.")
                row = host_row(prompt, text_prompt, response, fields, self.placeholders, name=name)
                rows.append(with_token_types(model, row))
                live.append(mask)
        return HostRows(rows, live, list(range(len(rows))))

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, MicroBatch]]:
        """swift's hook: one entry for each micro-batch. The teacher reads all of them, so that the gate has one
        threshold."""
        chunks = self.split_by_mini_batches(samples)
        batch = self.host_rows([sample for chunk in chunks for sample in chunk])
        numbers, parts = iter(range(len(batch.rows))), []
        for chunk in chunks:
            parts.append([next(numbers) for _ in chunk])
        scored = self.step.score_teacher(self.teacher_model, batch, parts)
        counts = [self.step.count([batch.lengths[number] for number in part]) for part in parts]
        totals = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device), "sum").tolist()
        steps = self.args.gradient_accumulation_steps if self.model.training else 1
        windows = [sum(totals[first : first + steps]) for first in range(0, len(totals), steps)]
        return [{"vgs": MicroBatch(scored, part, windows[i // steps])} for i, part in enumerate(parts)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, MicroBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """swift's hook: the loss of one micro-batch, which the host divides by its accumulation steps."""
        part, mode = inputs["vgs"], "train" if self.model.training else "eval"
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        items = part.items / (self.accelerator.num_processes * steps)
        loss, output = self.step.student_loss(model, part.scored, part.rows, items)
        tokens = sum(part.scored.batch.lengths[number] for number in part.rows)
        for name, value in sums(output).items():  # their log is the mean over micro-batches
            self._metrics[mode][f"vgs/{name}"].append(value.item() / max(tokens, 1))
        return (loss, {}) if return_outputs else loss


def _forbid(student: nn.Module, ids: Sequence[int]) -> None:
    """No response may contain an image token: swift samples whatever the model's generation config allows."""
    config = student.generation_config
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *ids})


def _without_images(sample: Any) -> Any:
    """The sample without its evidence."""
    text = copy.copy(sample)
    text.images, text.videos, text.audios = [], [], []
    text.messages = words_alone(sample.messages, IMAGE_MARK)
    return text


def _parts(encoded: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(prompt [P], response [T], the response's own tokens [T] bool, image fields) of what swift's template encodes."""
    ids, labels = (torch.as_tensor(encoded[name], dtype=torch.int64) for name in ("input_ids", "labels"))
    own = labels != IGNORED
    first = int(own.nonzero()[0]) if own.any() else len(ids)
    fields = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    return ids[:first], ids[first:], own[first:], fields


TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.{VGSTrainer.__name__}"
