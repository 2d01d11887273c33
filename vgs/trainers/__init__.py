"""Training on top of TRL: distillation, self-distillation and GRPO with distillation, with exact resume.

``distillation`` reads as a training step and ``step`` has what one computes; ``settings`` are the knobs, and
``host_hooks`` is where TRL and transformers call the trainers.
"""
