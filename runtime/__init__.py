"""The runtime: a policy's rank for every stretch of text, applied inside any Hugging Face causal LM.

One request, in the order of the files: `loading` and `adapter` read, `ladder` factors, `plan` settles the run,
`adaptive` takes the forward apart into blocks, `stream` (with `signals` and `machine`) decides, `gate` applies, `kv`
keeps the pages, `generate` is the function and the command.
"""

from .adapter import Adapter, load_adapter
from .adaptive import AdaptiveRun, adaptive
from .export import export_rung
from .generate import Generation, generate
from .ladder import Ladder, build_ladder
from .loading import load_model, load_tokenizer

__all__ = [
    "Adapter",
    "AdaptiveRun",
    "Generation",
    "Ladder",
    "adaptive",
    "build_ladder",
    "export_rung",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
]
