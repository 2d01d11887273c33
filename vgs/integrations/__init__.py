"""VGS inside other people's trainers: verl and ms-swift. Each host samples and holds the models; the loss is ours.

Nothing here is imported by the rest of ``vgs``. ``options`` reads what a run wants, ``rows`` makes prompt groups of a
host's rows, ``step`` scores them; ``verl`` and ``swift`` call these from each host's own hooks.
"""
