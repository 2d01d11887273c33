"""VGSTrainer: Visual Gradient Steering on TRL's on-policy distillation trainer.

The host samples responses, batches, accumulates, logs, saves and resumes. This subclass adds the text-only view to the
sampled batch, replaces the loss, and measures. Its hooks are private names of TRL 1.16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import DistributedType
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import ProcessorMixin, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput

from .checkpoints import ExactResume, check_writable
from .config import VGSConfig
from .data import answers_match
from .groups import PromptGroup, response_lengths
from .pairing import encode_groups, placeholder_ids
from .passes import select_responses
from .positions import is_verified
from .rollouts import expand_images_once, forbid_tokens, greedy_decoding, sampled_groups
from .scoring import freeze
from .steering import SteeringState, gradient_norm
from .step import UNSHARDED, MicroBatch, StepScorer, mean_terms, run_inside


class VGSTrainer(ExactResume, DistillationTrainer):
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
        check_writable(args.output_dir)
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
        freeze(self.accelerator.unwrap_model(self.model), vision=args.freeze_vision, embeddings=args.freeze_embeddings)
        models = [self.accelerator.unwrap_model(x) for x in (self.model, self.teacher_model)]
        packs = all(is_verified(model) for model in models)
        self.step_scorer = StepScorer(args, self.accelerator, self.teacher_model, self._anchor(), packs)

    def _check_models(self) -> None:
        if not self._is_vlm or not self.placeholder_ids:
            raise TypeError(f"model must be a vision-language model with a processor, got {type(self.model).__name__}.")
        teacher = placeholder_ids(self.accelerator.unwrap_model(self.teacher_model).config)
        if teacher != self.placeholder_ids:
            raise ValueError(
                f"teacher_model has image and video token ids {teacher}, the student {self.placeholder_ids}; both must "
                "read the same prompts."
            )
        sharded = self.accelerator.distributed_type not in UNSHARDED
        # The host shards the teacher under DeepSpeed alone; FSDP leaves it whole on every rank.
        if self.args.teacher_offload and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "teacher_offload=True needs a whole teacher, but DeepSpeed holds its parameters. Use DeepSpeed's own "
                "offloading to the CPU."
            )
        if self.args.teacher_offload and getattr(self.teacher_model, "is_quantized", False):
            raise ValueError("teacher_offload=True cannot move a quantized teacher. Use one of the two.")
        checkpointing = self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {})
        if self.args.fixed_eta is None and checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                'eta="measure" needs gradient checkpointing that is not reentrant. Set use_reentrant to false in '
                "gradient_checkpointing_kwargs, or eta to a number."
            )
        if self.args.num_generations > 1 and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                f"num_generations={self.args.num_generations} needs a dataset with a length, got "
                f"{type(self.train_dataset).__name__}."
            )
        if self.args.fixed_eta is None and sharded:
            raise ValueError(
                f'eta="measure" needs whole parameters, but they are sharded ({self.accelerator.distributed_type}). '
                'Measure once on one device or under DDP and set eta to that number, or use "paper-2b" / "paper-4b".'
            )

    def _anchor(self) -> PromptGroup:
        """A prompt with a small image and one token to it."""
        sample = {"prompt": [{"role": "user", "content": "."}], "images": [Image.new("RGB", (64, 64))]}
        response = [[self._tokenizer.eos_token_id]]
        options = {"device": self.accelerator.device, **self.chat_template_kwargs}
        return encode_groups(self.processing_class, [sample], [response], self.placeholder_ids, **options)[0]

    @property
    def objective(self) -> VGSObjective:
        """The objective in force: eta as fixed or measured so far (1 before the first measurement), lam as due."""
        eta = self.args.fixed_eta
        if eta is None:
            eta = self.steering.eta if self.steering.ratios else 1.0
        objective, every = self.args.objective(eta), self.args.lp_every
        if not self.model.training or every == 1:
            return objective
        return replace(objective, lam=0.0 if self.state.global_step % every else every * objective.lam)

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
        # The host marks a prompt without images by None, which no processor takes beside prompts with some.
        return prompt_ids, images if images is None else [part or [] for part in images], fields

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: dict, has_tool_images: bool = False
    ) -> list[list[int]]:
        if self.model.training or not self.args.eval_greedy:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        with greedy_decoding(self):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        """The host's, with every prompt ``num_generations`` times in a row."""
        host, count = super()._get_train_sampler(dataset), self.args.num_generations
        return RepeatSampler(
            host.data_source,
            mini_repeat_count=count,
            batch_size=host.batch_size // count,
            repeat_count=host.repeat_count,
            shuffle=host.shuffle,
            seed=host.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A sampled batch: prompts with their responses, what the teacher says of them, and the loss's divisor."""
        output = super()._generate_and_score_completions(inputs)
        self._score_answers(inputs, output)
        groups = sampled_groups(
            output,
            [x["prompt"] for x in inputs],
            self.args.num_generations if self.model.training else 1,
            self.processing_class,
            self.placeholder_ids,
            **self.chat_template_kwargs,
        )
        items = output["num_items_in_batch"]
        if self.args.loss_reduction == "trajectory":
            # What the host divides by: responses instead of tokens.
            count = sum(length > 0 for length in response_lengths(groups))
            items = self.accelerator.gather(torch.tensor([count], device=items.device)).sum()
        return {"groups": groups, "num_items_in_batch": items}

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
        """The next micro-batch, with the teacher's part. As the host's, but responses to one prompt stay together."""
        if not self.model.training:
            return self._with_teacher(self._generate_and_score_completions(generation_batch))
        steps = self.args.gradient_accumulation_steps
        position = self._step % steps
        if position == 0 or self._buffered_inputs is None:
            batch = self._with_teacher(self._generate_and_score_completions(generation_batch))
            size = len(batch["teacher"]) // steps
            self._buffered_inputs = [
                {
                    "groups": select_responses(batch["groups"], range(first, first + size)),
                    "teacher": batch["teacher"][first : first + size],
                    "num_items_in_batch": batch["num_items_in_batch"],
                }
                for first in range(0, size * steps, size)
            ]
            wanted = 0 if self.args.fixed_eta is not None else self.args.eta_batches
            if len(self.steering.ratios) < wanted:
                self._measure_eta()
        return self._buffered_inputs[position]

    def _with_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        objective = self.objective
        text = self.args.log_terms or objective.needs_text
        return {**batch, "teacher": self.step_scorer.score_teacher(batch["groups"], objective, text)}

    def _measure_eta(self) -> None:
        """One measurement of eta on all micro-batches of this optimizer step (arXiv 2606.00564, Eq. 15)."""
        student = self.accelerator.unwrap_model(self.model)
        parameters = [p for p in student.parameters() if p.requires_grad]

        def losses(objective: VGSObjective) -> Iterator[Tensor]:
            for inputs in self._buffered_inputs:
                batch = self._micro_batch(inputs, inputs["num_items_in_batch"], objective, terms=False)
                for chosen in batch.passes:
                    yield self.step_scorer.pass_loss(student, batch, chosen)[0]

        steered = replace(self.args.objective(1.0), lam=0.0)
        norms = [
            gradient_norm(losses(objective), parameters, lambda x: self.accelerator.reduce(x, reduction="mean"))
            for objective in (replace(steered, gamma=0.0), steered)
        ]
        self.steering.add_ratio(*norms)

    # ---- loss

    def _token_weights(self, lengths: list[int], num_items: Tensor | float | None) -> list[Tensor]:
        """[T] float32 for every response: what a token counts; ``num_items`` is None in evaluation (this batch)."""
        by_token = self.args.loss_reduction == "token"
        if num_items is None:
            num_items = max(sum(lengths) if by_token else sum(length > 0 for length in lengths), 1)
        items = torch.as_tensor(num_items, dtype=torch.float32, device=self.accelerator.device)
        return [(1.0 / (items if by_token else items * max(length, 1))).expand(length) for length in lengths]

    def _micro_batch(
        self, inputs: dict[str, Any], num_items: Tensor | float | None, objective: VGSObjective, terms: bool
    ) -> MicroBatch:
        weights = self._token_weights(response_lengths(inputs["groups"]), num_items)
        return self.step_scorer.micro_batch(inputs["groups"], inputs["teacher"], weights, objective, terms)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch. All its passes but the last have gone backward already when it returns."""
        training = self.model.training
        num_items = None
        if training:  # per process: gradients are averaged over processes
            num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        student = self.accelerator.unwrap_model(model)
        batch = self._micro_batch(inputs, num_items, self.objective, self.args.log_terms)
        done, outputs = 0.0, []
        for index, chosen in enumerate(batch.passes):
            last = index + 1 == len(batch.passes)
            with nullcontext() if last or not training else self._without_synchronisation(model):
                task = partial(self.step_scorer.pass_loss, student, batch, chosen)
                loss, output = run_inside(self._forward_redirection, model, student, task)
                value = output.loss.detach()
                outputs.append(replace(output, loss=value))
                if training and not last:
                    self._backward(loss)
            done = done + (loss + (value - loss.detach()) if last else value)  # the value, unrounded by the wrapper
        self._log(outputs, training)
        return (done, None) if return_outputs else done

    def _backward(self, loss: Tensor) -> None:
        # As the host's own backward: under DeepSpeed the loss is scaled already.
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))

    @contextmanager
    def _without_synchronisation(self, model: nn.Module) -> Iterator[None]:
        """Gradients of the passes inside stay on their rank, and no engine takes them for the step's last."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            state._set_sync_gradients(before)

    def _log(self, outputs: list[VGSOutput | DivergenceOutput], training: bool) -> None:
        values = {"eta": self.objective.eta, **mean_terms(self.accelerator, outputs, self.args.log_terms)}
        if self.objective.lam == 0:  # without a gated term, a gate would only tell how the batch was split
            values.pop("gate", None)
        metrics = self._metrics["train" if training else "eval"]
        for name, value in values.items():
            metrics[name].append(value)
        if training and self.args.log_terms:
            self._watched.append([values[name] for name in ("language", "student_vds", "vds")])
            if len(self._watched) >= self.current_gradient_accumulation_steps:
                self.steering.watch(*[fmean(column) for column in zip(*self._watched, strict=True)])
                self._watched.clear()
