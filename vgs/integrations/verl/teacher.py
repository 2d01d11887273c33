"""The teacher in verl's actor: loaded by every rank, divided among them or whole, with its weights lent to the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig
from verl.utils.device import get_device_id, get_torch_device
from verl.utils.fsdp_utils import MixedPrecisionPolicy, apply_fsdp2, load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.utils.model import get_hf_auto_model_class

from ...errors import config_errors
from ..options import DTYPES, HostOptions


def load_teacher(
    options: HostOptions, engine_config: Any, mesh: DeviceMesh, *, attention: str, trust_remote_code: bool = False
) -> nn.Module:
    """The frozen teacher, in evaluation mode.

    Args:
        options: its path, dtype and placement.
        engine_config: of the actor: its wrapping policy.
        mesh: the actor's, over which "sharded" divides the layers.
        attention: the actor's ``attn_implementation``.
        trust_remote_code: as of the actor.

    Raises:
        ConfigError: weights that cannot be loaded.
    """
    with config_errors(f"teacher {options.teacher!r} cannot be loaded", OSError, ValueError, KeyError):
        loading = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(options.teacher, attn_implementation=attention, **loading)
        kind = get_hf_auto_model_class(hf_config=config)
        teacher = kind.from_pretrained(options.teacher, config=config, dtype=DTYPES[options.teacher_dtype], **loading)
    teacher.eval().requires_grad_(False)
    if options.teacher_placement == "sharded":
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[options.teacher_dtype], cast_forward_inputs=True)
        # Every rank read the same files: each keeps its part, and none has to send the others theirs.
        apply_fsdp2(teacher, {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}, engine_config)
    if options.teacher_offload:
        return teacher.to("cpu")
    return teacher.to(get_device_id())


@contextmanager
def on_device(teacher: nn.Module, options: HostOptions) -> Iterator[None]:
    """The teacher can score inside; behind it an offloaded one is in host memory again."""
    if not options.teacher_offload:
        yield
        return
    load_fsdp_model_to_gpu(teacher)
    try:
        yield
    finally:
        offload_fsdp_model_to_cpu(teacher)
        get_torch_device().synchronize()  # the copies go on behind verl's call
