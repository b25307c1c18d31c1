"""The reference path: any causal LM of transformers, in plain PyTorch; what a fast path must equal.

adaptive    the context manager: hooks and methods put in, and taken out again
run         the blockwise forward
layout      input columns -> positions; padding never reaches the model
gate        rung weights -> the update of every adapted linear
attention   the model's own attention, with an ear on it
mask        which slots a query may see
pages/      the KV cache of 16-token pages
"""
