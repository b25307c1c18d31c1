"""Text in, tensors out: where documents come from and how they become token batches.

The flow is `load_documents` (any source -> id, prompt, completion), then `encode` (-> token ids with an exact prompt
boundary), for perplexity over running text `pack` (-> blocks of one length), then `collate` (-> batches).
This package imports none of its siblings, so that training, evaluation and serving read text the same way.
"""

from data.collate import collate, completion_mask
from data.encode import encode
from data.load import load_documents, split_names
from data.pack import pack

__all__ = ["collate", "completion_mask", "encode", "load_documents", "pack", "split_names"]
