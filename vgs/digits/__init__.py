"""The built-in task: questions about real handwritten digits, with models that train in minutes on a CPU.

The demo and the studies run on it.
"""
