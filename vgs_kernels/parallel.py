"""Collectives over data-parallel ranks, and over ranks that share a vocabulary.

Ranks that share a vocabulary must take the same decisions: how many tiles there are, which tokens are gated. They do so
from the same tokens and from merged statistics, which all_reduce leaves with the same bits on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .rows.layout import RunningStatistics


def group_name(process_group: dist.ProcessGroup | None) -> str | None:
    """Name under which a process group travels through a registered operator; None outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return (process_group if process_group is not None else dist.group.WORLD).group_name


def _resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _gather(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which have one shape."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return parts


def gather_rows(values: Tensor, name: str | None) -> Tensor:
    """Concatenate [n_r] tensors of different lengths from all ranks; collective, also for a rank with none."""
    if name is None:
        return values
    group = _resolve(name)
    counts = torch.cat(_gather(torch.tensor([values.numel()], device=values.device), group)).tolist()
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    return torch.cat([part[:count] for part, count in zip(_gather(padded, group), counts, strict=True)])


class VocabularyShard(NamedTuple):
    """The columns of a vocabulary that this rank holds and uses: all of them where no group shares it."""

    columns: int
    largest: int
    """Columns that the rank with most of them uses: what all ranks plan their tiles for."""
    total: int
    """Columns of all ranks together."""
    start: int = 0
    group: str | None = None

    @classmethod
    def of(
        cls,
        name: str | None,
        heads: Sequence[Tensor],
        vocab: int | None,
        target_ids: Tensor | None,
        ignored: Tensor | None = None,
    ) -> VocabularyShard:
        """Find this rank's place, and check what only the group together knows; collective.

        Args:
            name: of the process group; None: this rank has the whole vocabulary.
            heads: their weights here, [V_r, .] each.
            vocab: leading columns to use, of all ranks together; None means all.
            target_ids: global ids, or None.
            ignored: [N] bool, those that may be anything.
        """
        if name is None:
            return cls(vocab, vocab, vocab)
        group = _resolve(name)
        sizes = torch.tensor([len(head) for head in heads], device=heads[0].device)
        sizes = torch.stack(_gather(sizes, group)).tolist()
        columns = checks.shards(sizes, vocab)
        checks.ids_in_vocabulary("target_ids", target_ids, ignored, sum(columns))
        rank = dist.get_rank(group)
        return cls(columns[rank], max(columns), sum(columns), sum(size[0] for size in sizes[:rank]), name)

    def local(self, ids: Tensor | None) -> Tensor | None:
        """Global ids as columns of this shard; those of other shards lie outside it."""
        return ids if ids is None or self.start == 0 else ids - self.start

    def merge(self, state: Tensor, picked: Tensor | None) -> None:
        """From the statistics [K, R] of a shard, and logits [P, R] of columns that one shard has, to those of all."""
        if self.group is None:
            return
        group = _resolve(self.group)
        x = RunningStatistics(state)
        maxima = x.common_maxima()
        both = torch.cat([maxima, *([] if picked is None else [picked])])  # a copy
        dist.all_reduce(both, dist.ReduceOp.MAX, group)
        if picked is not None:
            picked.copy_(both[len(maxima) :])
        x.rescale_to(both[: len(maxima)])
        addends = x.addends()
        merged = torch.stack(addends)
        dist.all_reduce(merged, group=group)
        for addend, value in zip(addends, merged, strict=True):
            addend.copy_(value)

    def top(self, values: Tensor, count: int) -> Tensor:
        """The ``count`` largest of all shards' values [R, <= count], in descending order."""
        if self.group is None:
            return values
        padded = torch.nn.functional.pad(values, (0, count - values.shape[1]), value=-torch.inf)
        return torch.cat(_gather(padded, _resolve(self.group)), 1).topk(count).values

    def sum_exponentials(self, logs: Tensor) -> None:
        """log sum exp of what each rank has, in place."""
        if self.group is None:
            return
        group = _resolve(self.group)
        top = logs.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        top.masked_fill_(top == -torch.inf, 0)
        total = (logs - top).exp()
        dist.all_reduce(total, group=group)
        logs.copy_(total.log().add_(top))

    def sum(self, *values: Tensor | None) -> None:
        """Add up what each rank has of sums over the vocabulary, in place."""
        if self.group is None:
            return
        for value in values:
            if value is not None and value.numel():
                whole = value.contiguous()  # of some columns a copy: collectives take memory as it lies
                dist.all_reduce(whole, group=_resolve(self.group))
                value.copy_(whole)
