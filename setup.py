import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vgs_kernels" / "__init__.py").read_text()).group(1)

DEMO = ["scikit-learn", "scipy", "matplotlib"]
MATH = ["math-verify>=0.9,<0.10"]  # the reward math_verify
TRAIN = [
    "transformers>=5.17",
    "trl>=1.16,<1.17",  # the trainer overrides private hooks of DistillationTrainer
    "accelerate>=1.15",
    "datasets>=4.0",
    "liger-kernel>=0.8",
    "peft>=0.18",
    "pillow",
    "pyyaml",
]
DEV = ["pytest>=8", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "bitsandbytes>=0.46.1"]

setup(
    name="vgs-kernels",
    version=VERSION,
    description="Visual Gradient Steering: exact fused losses and a trainer for on-policy distillation of VLMs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vgs_kernels*", "vgs", "vgs.*"]),
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={"train": TRAIN, "math": MATH, "demo": TRAIN + DEMO, "dev": TRAIN + DEMO + MATH + DEV},
    entry_points={"console_scripts": ["vgs=vgs.cli.main:main"]},
)
