"""The loss of a micro-batch, its passes one after the other, and what is logged of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput

from .micro_batch import MicroBatch, mean_terms
from .step import StepScorer, run_inside

Outputs = list[VGSOutput | DivergenceOutput]


def token_weights(
    lengths: Sequence[int], reduction: str, num_items: Tensor | float | None, device: torch.device
) -> list[Tensor]:
    """[T] float32 for every response: what a token counts.

    Args:
        lengths: T of every response.
        reduction: ``"token"``: all tokens count alike; ``"trajectory"``: all responses do, and the tokens of one.
        num_items: tokens or responses that the loss is a mean of; None for those of ``lengths``.
        device: of the result.
    """
    by_token = reduction == "token"
    if num_items is None:
        num_items = max(sum(lengths) if by_token else sum(length > 0 for length in lengths), 1)
    items = torch.as_tensor(num_items, dtype=torch.float32, device=device)
    return [(1.0 / (items if by_token else items * max(length, 1))).expand(length) for length in lengths]


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
            loss, output = run_inside(scorer.redirect, model, student, task)
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
    accelerator: Accelerator, outputs: Outputs, objective: VGSObjective, log_terms: bool
) -> dict[str, float]:
    """eta, and a micro-batch's means over the tokens of all ranks."""
    values = {"eta": objective.eta, **mean_terms(accelerator, outputs, log_terms)}
    if objective.lam == 0:  # without a gated term, a gate would only tell how the batch was split
        values.pop("gate", None)
    return values
