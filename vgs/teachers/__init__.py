"""Where a teacher's hidden states come from: a model in this process, a cache on the disk, or a server elsewhere.

All of them keep one protocol (``protocol.Teacher``), so that a step does not know which of them it has.
"""
