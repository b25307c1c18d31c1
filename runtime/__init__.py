"""The runtime: a policy's rank for every stretch of text, applied inside any Hugging Face causal LM.

One request, room by room: `generate` is the function and the command, `loading` and `ladder` read, `plan` settles what
every row may spend, `control` decides, `reference` runs any model and applies (`ops`), `engine` decodes those of the
LLaMA family in one graph, `kv` says how pages are stored.
"""

from .export import export_policy, export_rung
from .generate import Generation, adaptive, generate
from .ladder import Adapter, Ladder, build_ladder, load_adapter, load_ladder, open_ladder, save_ladder
from .loading import load_model, load_tokenizer
from .reference.run import AdaptiveRun

__all__ = [
    "Adapter",
    "AdaptiveRun",
    "Generation",
    "Ladder",
    "adaptive",
    "build_ladder",
    "export_policy",
    "export_rung",
    "generate",
    "load_adapter",
    "load_ladder",
    "load_model",
    "load_tokenizer",
    "open_ladder",
    "save_ladder",
]
