"""The fast path: a decode step of a LLaMA-like model as one CUDA graph, all that changes from row to row in tensors."""
