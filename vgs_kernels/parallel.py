"""Collectives over data-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(process_group: dist.ProcessGroup | None) -> str | None:
    """Name under which a process group travels through a registered operator; None outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return (process_group if process_group is not None else dist.group.WORLD).group_name


def gather_rows(values: Tensor, name: str | None) -> Tensor:
    """Concatenate [n_r] tensors of different lengths from all ranks; collective, also for a rank with none."""
    if name is None:
        return values
    group = dist.distributed_c10d._resolve_process_group(name)
    size = torch.tensor([values.numel()], device=values.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    counts = torch.cat(sizes).tolist()
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
