"""The reference path: any causal LM of transformers, in plain PyTorch; what a fast path must equal.

adaptive      the context manager: hooks and methods put in, and taken out again
architecture  what a model must have to be served; the others are refused by name
run           the blockwise forward
layout        input columns -> positions; padding never reaches the model
gate          rung weights -> the update of every adapted linear
attention     the model's own attention, with an ear on it
mask          which slots a query may see: the model's own rule
rope          frequencies of the whole call, where they depend on its length
pages/        the KV cache of 16-token pages
"""
