"""The command ``vgs``: one YAML file says what is trained on what.

Commands are thin; the work is done by the other rooms.
"""
