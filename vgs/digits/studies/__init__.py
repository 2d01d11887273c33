"""Studies on the built-in task: several seeds, intervals, a results.json and a picture each.

Each module has ``run_study(out, cache, quick)``.
"""

STUDIES = {
    "grpo": "GRPO alone, with plain distillation and with VGS",
    "steering": "plain distillation and steering with students of three maturities of vision, and what each part does",
    "self-distillation": "self-distillation with clean digits, labels or noise as privileged context",
}
