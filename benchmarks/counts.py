"""The floors by count: what a job's matrix products and its unavoidable traffic would take at given ceilings."""

from __future__ import annotations

from .jobs import JOBS
from .problem import SHAPES
from .report import duration, size, table

#: Bytes that the row kernels and the products exchange for each token and vocabulary entry, 16-bit inputs, four rows:
#: float32 logits written by the products and read by either sweep, a 16-bit gradient written and read by two products.
SLAB_BYTES = 4 * 4 + 2 * (4 * 4) + 2 + 2 * 2


def tables(tokens: int, flops: float, bytes_per_second: float) -> str:
    """Markdown: products and compulsory bytes for every shape and job, bf16."""
    lines = []
    for name, shape in SHAPES.items():
        if name in ("cpu", "gate"):  # sizes for a CPU
            continue
        for job_name, job in JOBS.items():
            if job.dense:
                continue
            work = job.flops(shape, tokens)
            moved = job.compulsory_bytes(shape, tokens, 2)
            columns = sum(phase.columns(shape) for phase in job.phases(shape))
            lines.append(
                [
                    *(name, job_name, f"{columns:,.0f}", f"{work / 1e12:.1f}", duration(work / flops)),
                    *(size(moved), duration(moved / bytes_per_second)),
                ]
            )
    header = ["shape", "job", "GEMM columns a token", "TFLOP", "at the ceiling", "compulsory bytes", "at the ceiling"]
    caption = (
        f"Computed, not measured: N {tokens:,}, bf16, {flops / 1e12:g} TFLOP/s and {bytes_per_second / 1e12:g} TB/s. "
        f"Slabs that pass through memory add {SLAB_BYTES} B for each token and vocabulary entry (four rows)."
    )
    return f"{caption}\n\n{table(header, lines)}"
