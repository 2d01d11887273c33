"""verl's FSDP2 engine with the loss of VGS in place of, or beside, the policy loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import AutoConfig
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches

from ...data.prompts import anchor_group
from ...errors import ConfigError, config_errors
from ...models.families import placeholder_ids
from ...models.tokenizers import load_tokenizer
from ..models import check_models
from ..options import read_options
from ..signatures import check_signatures
from ..step import HostStep, sums
from . import VENDOR
from .batches import read_rows
from .patches import current, in_layers, library_methods, remember, verl_methods
from .teacher import load_teacher, on_device

#: "fsdp" only to refuse it: unregistered, verl would take its own engine without a word.
BACKENDS = ["fsdp", "fsdp2"]
#: What is overridden or called of verl, as this version has it.
KNOWN_VERSION = "0.9.1"
SIGNATURES = {
    FSDPEngineWithLMHead.initialize: "self",
    FSDPEngineWithLMHead._build_module: "self",
    FSDPEngineWithLMHead.forward_backward_batch: "self, data, loss_function, forward_only",
    FSDPEngineWithLMHead.forward_step: "self, micro_batch, loss_function, forward_only",
    prepare_micro_batches: (
        "data, dp_group, num_batches_divided_by, same_micro_num_in_dp, min_num_micro_batch, use_dynamic_bsz_balance"
    ),
}
ROW = "vgs_row"  # the column that says which row of the batch a row of a micro-batch is


@EngineRegistry.register(model_type="language_model", backend=BACKENDS, device=["cuda", "npu", "cpu"], vendor=VENDOR)
class VGSEngine(FSDPEngineWithLMHead):
    """The actor's engine.

    A reference policy, which only runs forward, is verl's own. The options are read from the environment, see
    ``vgs.integrations.options``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As verl's engine.

        Raises:
            ConfigError: a version of verl whose methods have other parameters, FSDP1, its own offloading of
                parameters, sequence parallelism, or a wrong option.
        """
        check_signatures("verl", KNOWN_VERSION, SIGNATURES)
        super().__init__(*args, **kwargs)
        self._step: HostStep | None = None
        if self.engine_config.forward_only:
            return
        if self.engine_config.strategy != "fsdp2":
            raise ConfigError(f"actor.strategy must be 'fsdp2' with VGS, got {self.engine_config.strategy!r}.")
        if self.engine_config.offload_policy:
            raise ConfigError("actor.fsdp_config.offload_policy must be False with VGS; param_offload does the same.")
        if self.ulysses_sequence_parallel_size > 1:
            raise ConfigError(
                "actor.ulysses_sequence_parallel_size must be 1 with VGS, got "
                f"{self.ulysses_sequence_parallel_size}: packed rows are not divided among ranks."
            )
        self._options = read_options(needs_teacher=True)

    def _build_module(self) -> nn.Module:
        remember(self.model_config.hf_config)
        if not self.engine_config.forward_only:
            with config_errors(f"teacher {self._options.teacher!r} cannot be read", OSError, ValueError):
                trust = self.model_config.trust_remote_code
                remember(AutoConfig.from_pretrained(self._options.teacher, trust_remote_code=trust))
        return super()._build_module()

    def initialize(self) -> None:
        """Build the student as verl does, and the teacher; ask both how they may run.

        Raises:
            ConfigError: see ``vgs.integrations.models.check_models``.
        """
        super().initialize()
        if self.engine_config.forward_only:
            return
        options, config = self._options, self.model_config
        self.teacher = load_teacher(
            options,
            self.engine_config,
            self.device_mesh,
            attention=config.hf_config._attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        preset, objective = options.resolved()
        processor = config.get_processor()
        with library_methods():
            ways = check_models(
                self.module,
                self.teacher,
                processor,
                needs_images=preset.needs_text(objective),
                vocab_size=options.vocab_size,
                teacher_tokenizer=load_tokenizer(
                    {"path": options.teacher, "trust_remote_code": config.trust_remote_code}
                ),
                template_options=options.template_options,
            )
        if options.policy_coefficient and config.enable_gradient_checkpointing and in_layers():
            raise ConfigError(
                "policy_coefficient must be 0 with gradient checkpointing for this family, got "
                f"{options.policy_coefficient}: verl replaces its layers, and both losses share one backward."
            )
        if self.rank == 0:
            print(f"VGS: the student runs {ways[0]}, the teacher {ways[1]}.")
        self._placeholders, anchor = placeholder_ids(self.module.config), None
        if dist.get_world_size() > 1:
            anchor = anchor_group(processor, self._placeholders, get_device_id(), **options.template_options)
        self._step = HostStep(options, anchor, self._autocast)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """As verl's; before it the teacher reads the whole mini-batch, so that the gate has one threshold for it.

        Args:
            data: this rank's rows of a mini-batch.
            loss_function: verl's policy loss.
            forward_only: whether only log-probabilities are wanted, which are verl's own.
        """
        if forward_only or self._step is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        data = data.copy()
        data[ROW] = torch.arange(len(data))
        rows = read_rows(data, self.module, self._placeholders)
        self._verl_methods = current()
        parts, _ = prepare_micro_batches(data, dp_group=self.get_data_parallel_group(), same_micro_num_in_dp=True)
        with library_methods(), on_device(self.teacher, self._options):
            self._scored = self._step.score_teacher(self.teacher, rows, [part[ROW].tolist() for part in parts])
        counts = [sum(rows.lengths), self._step.count(rows.lengths)]
        totals = torch.tensor(counts, dtype=torch.float32, device=get_device_id())
        dist.all_reduce(totals, group=self.get_data_parallel_group())
        # verl averages gradients over ranks and adds up micro-batches.
        self._tokens, self._items = (totals / self.get_data_parallel_size()).tolist()
        with library_methods():  # in the backward, too, where checkpointed layers run again
            return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one micro-batch, and what verl reports of it.

        Args:
            micro_batch: rows of the mini-batch that ``forward_backward_batch`` has read.
            loss_function: verl's policy loss, added with the option ``policy_coefficient``.
            forward_only: as there.
        """
        if forward_only or self._step is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        rows = micro_batch[ROW].tolist()
        loss, output = self._step.student_loss(self.module, self._scored, rows, self._items)
        # Means over all tokens of the mini-batch: verl averages over ranks and adds up micro-batches.
        means = {name: value / max(self._tokens, 1.0) for name, value in sums(output).items()}
        values = {"loss": loss.detach(), **means}
        metrics = {f"vgs/{name}": Metric(value=x, aggregation=AggregationType.SUM) for name, x in values.items()}
        if not self._options.policy_coefficient:
            return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": metrics}
        with verl_methods(self._verl_methods):
            policy, meta = super().forward_step(micro_batch, loss_function, False)
        total = loss + self._options.policy_coefficient * policy
        return total, {**meta, "loss": total.detach().item(), "metrics": {**meta["metrics"], **metrics}}
