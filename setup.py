import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vgs_kernels" / "__init__.py").read_text()).group(1)

# Scoring and vgs_step: for a loop of one's own, or for a host with its own trainer.
CORE = [
    "transformers>=5.9",  # verl's: ``make test-verl`` runs scoring there; the tests of families need 5.16.1
    "pillow",
]
# The trainers, the data and the command line.
TRAIN = [
    *CORE,
    "transformers>=5.16.1",  # the oldest whose families pass the tests; the digits' processor needs as much
    "trl>=1.14,<2",  # the oldest that passes; the private hooks in use are checked when a trainer starts
    "accelerate>=1.15",  # the oldest that was run under FSDP2
    "datasets>=4.7",  # as TRL
    "peft>=0.18",  # ensure_weight_tying, for students whose head is their embedding
    "torchvision",  # the image processors of Qwen-VL
    "liger-kernel>=0.8.2",  # use_liger_kernel; as TRL
    "pyyaml",
    "jsonargparse>=4.53",  # types of settings
    "filelock>=3.12",  # a run's folder
]
VLLM = ["vllm>=0.22,<0.31"]  # what TRL 1.14 to 1.16 take; it brings a torch of its own
QUANT = ["bitsandbytes>=0.46.1"]  # load_in_8bit; as transformers
MATH = ["math-verify>=0.9,<0.10"]  # the reward math_verify
EVAL = ["scipy"]  # vgs eval --benchmarks: intervals and tests; lmms-eval itself has an environment of its own
DEMO = ["scikit-learn", "scipy", "matplotlib"]
# num2words: SmolVLM's processor is not built without it.
DEV = ["pytest>=8", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy", "num2words"]

setup(
    name="vgs-kernels",
    version=VERSION,
    description="Visual Gradient Steering: exact fused losses and a trainer for on-policy distillation of VLMs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vgs_kernels*", "vgs", "vgs.*"]),
    package_data={
        "vgs": ["py.typed"],
        "vgs_kernels": ["py.typed", "rows/*.c"],
        "vgs.evaluation.benchmarks": ["tasks/*"],
        "vgs.reports": ["page.css", "page.js"],
    },
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "core": CORE,
        "train": TRAIN,
        "vllm": TRAIN + VLLM,
        "quant": QUANT,
        "math": MATH,
        "demo": TRAIN + DEMO,
        "eval": TRAIN + EVAL,
        "dev": TRAIN + QUANT + MATH + DEMO + DEV,
    },
    entry_points={
        "console_scripts": ["vgs=vgs.cli.start:main"],
        "lmms_eval.models": ["vgs=vgs.evaluation.benchmarks.registration:manifest"],
        "verl.plugins": ["vgs = vgs.integrations.verl"],
    },
)
