"""Vision-language models from outside: families, heads, tokenizers, wrappers, the forward of prompts with responses.

It turns token ids and images into the hidden states that the losses take, packed without padding where that is exact.
"""
