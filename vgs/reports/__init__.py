"""Reports of runs that are done or under way: what their folders hold, as one page, pictures and numbers.

Nothing here runs a model.
"""
