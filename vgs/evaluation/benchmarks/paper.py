"""The paper's seven benchmarks, and what its Table 1 reports (arXiv 2606.00564, ICML version; accuracy in percent).

Of the single benchmarks, the gains of VGS over plain distillation are known here; the averages over the seven are known
for every row. The paper gives no seeds, intervals or evaluation settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from ...errors import ConfigError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: as the paper writes it. dataset: on the Hugging Face hub, with configuration and split.
        gain_2b, gain_4b: what VGS gained over plain distillation in the paper, Acc@1, in percentage points.
    """

    title: str
    dataset: str
    gain_2b: float
    gain_4b: float


#: Name (lmms-eval's task is ``vgs_NAME``) -> benchmark, in the paper's order.
BENCHMARKS = MappingProxyType(
    {
        "mmmu_pro_4": Benchmark("MMMU-Pro, 4 options", "MMMU/MMMU_Pro, standard (4 options), test", 2.14, 1.07),
        "logicvista": Benchmark("LogicVista", "lscpku/LogicVista, test", 3.35, 2.90),
        "mathverse_vision_dominant": Benchmark(
            "MathVerse, Vision-Dominant",
            "CaraJ/MathVerse-lmmseval, testmini_version_split, vision_dominant",
            2.08,
            2.78,
        ),
        "mathverse_vision_only": Benchmark(
            "MathVerse, Vision-Only", "CaraJ/MathVerse-lmmseval, testmini_version_split, vision_only", 1.61, 0.92
        ),
        "visualpuzzles": Benchmark("VisualPuzzles", "neulab/VisualPuzzles, train", 3.68, -0.44),
        "mathvision": Benchmark("MathVision", "MathLLMs/MathVision, test", 1.45, 2.63),
        "vlmsareblind": Benchmark("VlmsAreBlind", "XAI/vlmsareblind, valid", 2.26, 1.03),
    }
)
#: (model, method, mean Acc@1, mean Acc@16) over the seven benchmarks; None: not reported.
PAPER_MEANS = (
    ("2B", "initial student", 31.32, None),
    ("2B", "plain distillation", 43.74, 45.07),
    ("2B", "VGS", 46.10, 46.14),
    ("2B", "VGS, adaptive", 46.53, None),
    ("2B", "GRPO alone", 44.83, 45.68),
    ("2B", "plain distillation + GRPO", 45.41, 45.22),
    ("2B", "VGS + GRPO", 47.20, 46.57),
    ("4B", "initial student", 46.68, None),
    ("4B", "plain distillation", 56.64, 56.86),
    ("4B", "VGS", 58.12, 57.27),
    ("8B", "teacher", 61.37, None),
)
PAPER_NOTES = (
    "4B, VGS: 58.12 and 57.27 as printed; the means of the printed benchmarks are 58.19 and 57.37.",
    "2B, MMMU-Pro: +2.14 as printed; its two accuracies differ by 2.24.",
)


def find_benchmarks(text: str) -> list[str]:
    """Names of benchmarks, in the paper's order.

    Args:
        text: ``paper``, all seven; or names with commas between them.

    Raises:
        ConfigError: an unknown name.
    """
    if text == "paper":
        return list(BENCHMARKS)
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(BENCHMARKS)):
        raise ConfigError(f"--benchmarks must be paper or some of {', '.join(BENCHMARKS)}, got {unknown[0]!r}.")
    return [name for name in BENCHMARKS if name in names]
