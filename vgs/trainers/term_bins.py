"""The terms of a micro-batch by visual dependency: means over bins of equal count (arXiv 2606.00564, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from vgs_kernels import DivergenceOutput, VGSOutput

from ..evaluation.geometry import equal_bins

TERMS = ("standard", "visual", "language", "vds", "student_vds")


def terms_by_bin(
    accelerator: Accelerator, outputs: Sequence[VGSOutput | DivergenceOutput], bins: int | None
) -> dict[str, float]:
    """``TERM_bin_B`` -> mean over the tokens of all ranks in that bin of this micro-batch; nothing for empty bins,
    or for terms that the loss has not formed.

    Args:
        accelerator: knows the processes.
        outputs: of all passes; {} where they have no terms.
        bins: how many; None: {}.
    """
    if bins is None or getattr(outputs[0], "vds", None) is None:
        return {}
    names = [name for name in TERMS if getattr(outputs[0], name) is not None]
    table = torch.stack([torch.cat([getattr(x, name).float() for x in outputs]) for name in names], dim=1)
    table = accelerator.gather(accelerator.pad_across_processes(table, pad_index=math.nan))
    table = table[~table[:, 0].isnan()]
    means = {}
    for number, chosen in enumerate(equal_bins(table[:, names.index("vds")], bins)):
        if len(chosen):
            values = table[chosen].mean(dim=0).tolist()
            means |= {f"{name}_bin_{number}": value for name, value in zip(names, values, strict=True)}
    return means
