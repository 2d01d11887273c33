"""What a model can do: its accuracy, rewards, per-token terms and its gap to a teacher with more context.

Nothing here trains.
"""
