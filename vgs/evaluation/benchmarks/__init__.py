"""The paper's seven benchmarks, run by lmms-eval in an environment of its own.

Prompts, rule-based scores, intervals and paired tests are ours; lmms-eval brings datasets, model backends and the loop.
"""
