"""From files to prompts: datasets, images, both views of a prompt, gold answers, and what only a teacher sees.

Every command reads data here and nowhere else.
"""
