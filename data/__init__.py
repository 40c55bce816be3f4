"""Note tables, splits, tokenizers, the token cache, packing and the loader.

Nothing is imported here: the tokenising processes start from this package and must not load torch.
"""
