"""Training on top of TRL: distillation, self-distillation and GRPO with distillation, with exact resume.

``step`` shows what one step computes; ``settings`` are the knobs.
"""
