"""Floors and tiles by count: what products and traffic would take at given ceilings. Nothing here is measured."""

from __future__ import annotations

from vgs_kernels.plan import Plan

from .jobs import JOBS, Phase
from .problem import SHAPES, Shape
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
        alike: dict[tuple[float, float], list[str]] = {}
        for job_name, job in JOBS.items():
            if not job.dense:
                work = job.flops(shape, tokens), job.compulsory_bytes(shape, tokens, 2)
                alike.setdefault(work, []).append(job_name)
        for (work, moved), jobs in alike.items():
            columns = work / (2 * shape.vocab * tokens)
            lines.append(
                [
                    *(name, ", ".join(jobs), f"{columns:,.0f}", f"{work / 1e12:.1f}", duration(work / flops)),
                    *(size(moved), duration(moved / bytes_per_second)),
                ]
            )
    header = ["shape", "job", "GEMM columns a token", "TFLOP", "at the ceiling", "compulsory bytes", "at the ceiling"]
    caption = (
        f"Computed, not measured: N {tokens:,}, bf16, {flops / 1e12:g} TFLOP/s and {bytes_per_second / 1e12:g} TB/s. "
        f"Slabs that pass through memory add {SLAB_BYTES} B for each token and vocabulary entry (four rows)."
    )
    return f"{caption}\n\n{table(header, lines)}"


def _phase_work(phase: Phase, shape: Shape, tokens: int, workspace: int) -> tuple[Plan, list[tuple[float, float]]]:
    """Our plan for a phase with 16-bit inputs, and (FLOPs, bytes) of every kernel that it launches."""
    n, vocab = phase.tokens(tokens), shape.vocab
    rows_of_logits = phase.student + phase.teacher
    plan = Plan.fit(n, vocab, 4 * rows_of_logits, 2 * phase.d_hidden, workspace)
    work = []
    for rows in _parts(n, plan.rows):
        for views, width in ((phase.student, shape.student), (phase.teacher, shape.teacher)):
            times = 2 if plan.columns < vocab else 1  # a cut vocabulary is projected for either sweep
            work += [(2.0 * views * rows * vocab * width, vocab * (2.0 * width + 4 * views * rows))] * times
        read = 4.0 * rows_of_logits * rows * vocab
        work += [(0.0, read), (0.0, read + 2 * phase.d_hidden * rows * vocab)]
    for rows in _parts(n, plan.gradient_rows):
        flops, read, head = 2.0 * rows * vocab * shape.student, 2.0 * rows * vocab, vocab * shape.student
        work += [(flops, read + 2.0 * head)] * phase.d_hidden + [(flops, read + 8.0 * head)] * phase.d_weight
    return plan, work


def _parts(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


def workspaces(shape_name: str, tokens: int, flops: float, bytes_per_second: float) -> str:
    """Markdown: what ``workspace_bytes`` costs the exact VGS loss, at the ceilings and with nothing overlapping."""
    job, shape = JOBS["vgs"], SHAPES[shape_name]
    floor = job.flops(shape, tokens) / flops
    lines = []
    for mebibytes in (64, 128, 256, 512, 1024, 1280, 1792, 3072):
        plans, work = zip(
            *(_phase_work(phase, shape, tokens, mebibytes << 20) for phase in job.phases(shape)), strict=True
        )
        kernels = [kernel for kernels in work for kernel in kernels]
        time = sum(max(f / flops, b / bytes_per_second) for f, b in kernels)
        columns = "all" if plans[0].columns == shape.vocab else f"{plans[0].columns:,}"
        lines.append(
            [
                *(f"{mebibytes:,} MiB", f"{plans[0].rows} x {columns}", str(plans[0].gradient_rows)),
                *(size(sum(b for _, b in kernels)), duration(time), f"{floor / time:.2f}"),
            ]
        )
    header = ["workspace", "tile, tokens x columns", "gradient block", "traffic", "time", "floor / time"]
    caption = (
        f"Computed, not measured: {job.title}, {shape_name}, N {tokens:,}, bf16. Every kernel takes the longer of its "
        "FLOPs and its bytes at the ceilings; none overlaps another, none is launched late."
    )
    return f"{caption}\n\n{table(header, lines)}"
