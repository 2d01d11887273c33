"""What a run will need before it runs: parameters, work and memory, counted from the models' configs.

No weights are read.
"""
