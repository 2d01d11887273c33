"""The loss of a micro-batch, its passes one after the other, and what is logged of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput

from ..models.wrappers import run_inside
from .micro_batch import MicroBatch, mean_terms
from .settings import VGSOptions
from .step import StepScorer

Outputs = list[VGSOutput | DivergenceOutput]


def loss_in_passes(scorer: StepScorer, model: nn.Module, batch: MicroBatch, training: bool) -> tuple[Tensor, Outputs]:
    """A micro-batch's loss. In training all its passes but the last have gone backward when it returns.

    Args:
        scorer: runs a pass.
        model: the student as prepared by accelerate.
        batch: with its passes.
        training: False in evaluation, without any backward.

    Returns:
        The loss, 0-d, whose gradient is the last pass's; and the outputs of all passes.
    """
    accelerator = scorer.accelerator
    student = accelerator.unwrap_model(model)
    done, outputs = 0.0, []
    for index, chosen in enumerate(batch.passes):
        last = index + 1 == len(batch.passes)
        with nullcontext() if last or not training else unsynchronised(accelerator, model):
            task = partial(scorer.pass_loss, student, batch, chosen)
            loss, output = run_inside(model, task)
            value = output.loss.detach()
            outputs.append(replace(output, loss=value))
            if training and not last:
                backward(accelerator, loss)
        done = done + (loss + (value - loss.detach()) if last else value)  # the value, unrounded by the wrapper
    return done, outputs


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """As the host's own backward: under DeepSpeed the loss is scaled already."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))


@contextmanager
def unsynchronised(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gradients of the passes inside stay on their rank, and no engine takes them for the step's last."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield
    finally:
        state._set_sync_gradients(before)


def means_to_log(
    accelerator: Accelerator, outputs: Outputs, objective: VGSObjective, args: VGSOptions
) -> dict[str, float]:
    """eta and, of presets that read one, gamma as it is in force; and a micro-batch's means over the tokens of all
    ranks."""
    values = {"eta": objective.eta, **mean_terms(accelerator, outputs, args.log_terms)}
    if args.preset_in_force.reads("gamma") and args.gamma > 0:
        values["gamma_effective"] = objective.gamma
    if objective.lam == 0:  # without a gated term, a gate would only tell how the batch was split
        values.pop("gate", None)
    return values


def note(trainer: Any, means: dict[str, float]) -> None:
    """Add a micro-batch's means to a trainer's metrics and, in training, to what steering watches.

    Args:
        trainer: with ``HostHooks``.
        means: by name, and the number of their ``tokens``.
    """
    tokens = means.pop("tokens")
    for name, value in means.items():
        trainer.open_metrics[name].append(value)
    if trainer.model.training and {"language", "student_vds", "vds"} <= means.keys():
        trainer.steering.observe(means, trainer.current_gradient_accumulation_steps, tokens)
