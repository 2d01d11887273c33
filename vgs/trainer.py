"""VGSTrainer: Visual Gradient Steering on TRL's on-policy distillation trainer.

The host samples responses, batches, accumulates, logs, saves and resumes. This subclass adds the text-only view to the
sampled batch, replaces the loss, and measures. Its hooks are private names of TRL 1.16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import ProcessorMixin, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import maybe_gather_lm_head_ctx

from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput

from .config import VGSConfig
from .data import answers_match
from .pairing import MULTIMODAL_FIELDS, PairedViews, left_pad, pair_views, placeholder_ids, text_only_prompts
from .rollouts import expand_images_once, forbid_tokens, greedy_decoding
from .scoring import fused_loss, multimodal_rows, read_head, score_views
from .steering import SteeringState, gradient_norm

VDS_QUANTILES = (0.4, 0.7)
TERMS = ("standard", "visual", "language", "vds", "gate", "student_vds")


class VGSTrainer(DistillationTrainer):
    """On-policy distillation with Visual Gradient Steering (arXiv 2606.00564).

    Args:
        model: the student, a vision-language model or its id.
        teacher_model: the teacher, with the student's vocabulary and image tokens, or its id.
        args: a ``VGSConfig``.
        train_dataset, eval_dataset: samples with ``prompt`` (chat messages), ``images`` (list of PIL images) and, for
            the accuracy, ``answer`` (str).
        processing_class: the student's processor; None loads it.
        scorer: ``scorer(response_text, gold_answer) -> bool``; None compares the final answers
            (``vgs.data.answers_match``).
        callbacks, optimizers, quantization_config, peft_config: as in TRL.
        tools: not supported.

    Raises:
        TypeError: ``args`` is not a ``VGSConfig``, or ``processing_class`` is not a processor with images.
        ValueError: ``tools`` given, no teacher, different image tokens, or ``eta="measure"`` with sharded parameters.
    """

    _tag_names = ("trl", "distillation", "vgs")
    _name = "VGS"
    _paper = MappingProxyType(
        {"title": "Decomposed On-Policy Distillation for Vision-Language Reasoning", "id": "2606.00564"}
    )

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module,
        args: VGSConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        scorer: Callable[[str, str], bool] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
    ) -> None:
        if not isinstance(args, VGSConfig):
            raise TypeError(f"args must be a VGSConfig, got {type(args).__name__}.")
        if tools:
            raise ValueError("tools are not supported: a tool's reply has no text-only view. Pass tools=None.")
        if teacher_model is None:
            raise ValueError("teacher_model is needed: its hidden states with and without the image define the loss.")
        if processing_class is not None and not isinstance(processing_class, ProcessorMixin):
            raise TypeError(
                "processing_class must be a processor with an image processor (transformers.ProcessorMixin), got "
                f"{type(processing_class).__name__}: a text-only model has no image to steer towards."
            )
        self.steering = SteeringState()
        self._terms: dict[str, Tensor] = {}
        self._watched: list[list[float]] = []  # means of this optimizer step's micro-batches
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self.steering],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.scorer = scorer or answers_match
        self.placeholder_ids = placeholder_ids(self.model.config)
        self._check_models()
        forbid_tokens(self, self.placeholder_ids)
        if self.use_vllm and self.vllm_mode == "colocate":
            expand_images_once(self.vllm_generation, self.model.config.image_token_id)

    def _check_models(self) -> None:
        if not self._is_vlm or not self.placeholder_ids:
            raise TypeError(f"model must be a vision-language model with a processor, got {type(self.model).__name__}.")
        teacher = placeholder_ids(self.accelerator.unwrap_model(self.teacher_model).config)
        if teacher != self.placeholder_ids:
            raise ValueError(
                f"teacher_model has image and video token ids {teacher}, the student {self.placeholder_ids}; both must "
                "read the same prompts."
            )
        sharded = self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        )
        if self.args.fixed_eta is None and sharded:
            raise ValueError(
                f'eta="measure" needs whole parameters, but they are sharded ({self.accelerator.distributed_type}). '
                'Measure once on one device or under DDP and set eta to that number, or use "paper-2b" / "paper-4b".'
            )

    @property
    def objective(self) -> VGSObjective:
        """The objective in force, with the eta that is fixed or measured so far (1 before the first measurement)."""
        eta = self.args.fixed_eta
        if eta is None:
            eta = self.steering.eta if self.steering.ratios else 1.0
        return self.args.objective(eta)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "answer" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "answer"]

    # ---- rollouts

    def _tokenize_prompts(self, prompts: list) -> tuple:
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        limit = self.args.max_prompt_length
        longest = max(map(len, prompt_ids))
        if limit is not None and longest > limit:
            raise ValueError(
                f"A prompt has {longest} tokens, more than max_prompt_length={limit}. Filter the dataset "
                "(vgs.data.drop_long_prompts) or raise the limit; prompts are never truncated."
            )
        return prompt_ids, images, fields

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: dict, has_tool_images: bool = False
    ) -> list[list[int]]:
        if self.model.training or not self.args.eval_greedy:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        with greedy_decoding(self):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The host's batch plus ``text_prompt_ids``/``text_prompt_mask`` [B, Q], and the responses' accuracy."""
        output = super()._generate_and_score_completions(inputs)
        rendered = text_only_prompts(
            self.processing_class, [x["prompt"] for x in inputs], self.placeholder_ids, **self.chat_template_kwargs
        )
        ids, mask = left_pad(rendered, self._tokenizer.pad_token_id)
        device = output["prompt_ids"].device
        output["text_prompt_ids"], output["text_prompt_mask"] = ids.to(device), mask.to(device)
        if self.args.loss_reduction == "trajectory":
            # What the host divides by: responses instead of tokens.
            responses = output["completion_mask"].any(dim=1).sum()
            output["num_items_in_batch"] = self.accelerator.gather(responses).sum()
        self._score_answers(inputs, output)
        return output

    def _score_answers(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> None:
        kept = [ids[mask.bool()] for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)]
        texts = self._tokenizer.batch_decode(kept, skip_special_tokens=True)
        pairs = zip(texts, [x.get("answer") for x in inputs], strict=True)
        # Without a gold answer: NaN, so that every rank gathers as many values.
        correct = [math.nan if gold is None else self.scorer(text, gold) for text, gold in pairs]
        values = torch.tensor(correct, dtype=torch.float32, device=output["completion_ids"].device)
        training = self.model.training
        # In evaluation the last batch is filled up with repeated samples, which gather_for_metrics drops.
        values = self.accelerator.gather(values) if training else self.accelerator.gather_for_metrics(values)
        # One entry per sample: the host logs the mean of the entries, so batches of any size weigh right.
        if not values.isnan().all():
            self._metrics["train" if training else "eval"]["accuracy"].extend(values.tolist())

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        first = self._step % self.args.gradient_accumulation_steps == 0
        wanted = 0 if self.args.fixed_eta is not None else self.args.eta_batches
        if self.model.training and first and len(self.steering.ratios) < wanted:
            self._measure_eta()
        return inputs

    def _measure_eta(self) -> None:
        """One measurement of eta on all micro-batches of this optimizer step (arXiv 2606.00564, Eq. 15)."""
        student = self.accelerator.unwrap_model(self.model)
        parameters = [p for p in student.parameters() if p.requires_grad]

        def losses(objective: VGSObjective) -> Iterator[Tensor]:
            for batch in self._buffered_inputs:
                yield self._score(student, batch, batch["num_items_in_batch"], objective, terms=False).loss

        steered = replace(self.args.objective(1.0), lam=0.0)
        norms = [
            gradient_norm(losses(objective), parameters, lambda x: self.accelerator.reduce(x, reduction="mean"))
            for objective in (replace(steered, gamma=0.0), steered)
        ]
        self.steering.add_ratio(*norms)

    # ---- loss

    def _views(self, inputs: dict[str, Any]) -> PairedViews:
        return pair_views(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["text_prompt_ids"],
            inputs["text_prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            {name: inputs[name] for name in MULTIMODAL_FIELDS if name in inputs},
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def _token_weights(self, views: PairedViews, num_items: Tensor | int | None) -> Tensor:
        """[N] float32: what each token counts in the loss; ``num_items`` is None in evaluation (this batch alone)."""
        lengths = views.response_mask.sum(dim=1)
        if self.args.loss_reduction == "token":
            total = lengths.sum().clamp(min=1) if num_items is None else num_items
            return torch.ones_like(views.trajectory_ids, dtype=torch.float32) / total
        total = (lengths > 0).sum().clamp(min=1) if num_items is None else num_items
        return 1.0 / (lengths[views.trajectory_ids].float() * total)

    def _score(
        self,
        student: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
        objective: VGSObjective,
        terms: bool,
    ) -> VGSOutput | DivergenceOutput:
        """Both models over both views, and the loss, with its per-token terms if ``terms``."""
        views = self._views(inputs)
        weights = self._token_weights(views, num_items)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        # The host's redirection replaces the very forward that Accelerate wraps in autocast, so it is entered here.
        with self.accelerator.autocast():
            if terms or objective.gamma > 0 or objective.lam > 0:
                student_rows = score_views(student, views, objective.needs_text_gradient)
                scorer = score_views
            else:  # neither the loss nor a log needs the text-only view
                student_rows = multimodal_rows(student, views)
                scorer = multimodal_rows
            with torch.no_grad():
                teacher_rows = self._forward_redirection(self.teacher_model, teacher, scorer, teacher, views)
            layers = student.get_output_embeddings(), teacher.get_output_embeddings()
            parameters = [p for layer in layers for p in (layer.weight, getattr(layer, "bias", None))]
            with maybe_gather_lm_head_ctx(*parameters):
                return fused_loss(
                    student_rows,
                    teacher_rows,
                    read_head(student, student_rows[0].dtype),
                    read_head(teacher, teacher_rows[0].dtype),
                    objective,
                    token_weights=weights,
                    trajectory_ids=views.trajectory_ids,
                    return_terms=terms,
                    vocab_size=self.args.vocab_size,
                    workspace_bytes=self.args.loss_workspace_bytes,
                    backend=self.args.loss_backend,
                )

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs inside the student wrapper's forward. Returns loss, summed entropy and number of tokens, as the host."""
        terms = self.args.log_terms
        output = self._score(unwrapped_student, inputs, num_items_in_batch, self.objective, terms)
        count = inputs["completion_mask"].sum()
        self._terms = {name: getattr(output, name).float() for name in TERMS} if terms else {}
        return output.loss, output.entropy.sum(), count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The host's, plus the terms' means over all ranks' tokens in the logs."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        metrics["eta"].append(self.objective.eta)
        if self._terms:
            self._log_terms(metrics, training)
        return result

    def _log_terms(self, metrics: dict[str, list[float]], training: bool) -> None:
        vds = self._terms["vds"]
        sums = torch.stack([*[self._terms[name].sum() for name in TERMS], vds.new_tensor(len(vds))])
        sums = self.accelerator.gather(sums[None]).sum(dim=0)
        padded = self.accelerator.pad_across_processes(vds, pad_index=math.nan)
        quantiles = torch.nanquantile(self.accelerator.gather(padded), vds.new_tensor(VDS_QUANTILES))
        means = (sums[:-1] / sums[-1]).tolist()
        for name, value in zip(TERMS, means, strict=True):
            metrics[name].append(value)
        for level, value in zip(VDS_QUANTILES, quantiles.tolist(), strict=True):
            metrics[f"vds_q{round(100 * level)}"].append(value)
        if training:
            values = dict(zip(TERMS, means, strict=True))
            self._watched.append([values[name] for name in ("language", "student_vds", "vds")])
            if len(self._watched) >= self.current_gradient_accumulation_steps:
                self.steering.watch(*[fmean(column) for column in zip(*self._watched, strict=True)])
                self._watched.clear()
