"""What is minimised: Visual Gradient Steering, its relatives by name, and how tokens are weighted.

A preset says which rows form the target, by which divergence, with which weights; ``vgs_kernels`` computes it.
"""
