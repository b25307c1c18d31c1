"""How much of the adapter a chunk gets: from the signals of what is already known to a rung and a scale.

In the flow of a request (text, tokens, signals, chunker, POLICY, cross-fade gate, adapter ladder, logits) this package
is asked once per chunk, when the chunk opens. It imports no sibling: `runtime` measures the signals and acts on the
decisions, `training` fits a policy and calibrates its knob, and both meet here.

    limits      what a value may be: every field of every record here carries its own
    settings    everything about a run that is decided before its first token
    operating   what every row may spend: knob, start rung, KV policy, adapter
    contract    Summary in, Decision out, and the knob that moves a policy along its trade-off curve
    difficulty  what a token needs of an adapter, by its id
    fixed, percentile, learned             policies to serve
    random, oracle                         what they are compared with
    cost, curve                            what a rung costs; which knob spends a given budget
    measured                               what the rungs take on a device, as a file
    reading                                files from users, read before they are believed
    checkpoint                             a policy on disk, with what it was fitted to and how well it did
"""

from .checkpoint import KINDS, Fingerprints, PolicyCheckpoint
from .contract import Decision, RankPolicy, Summary
from .cost import LatencyTable, LatencyTables, adapter_cost
from .curve import KnobCurve, check_budget
from .fixed import FixedPolicy
from .learned import LearnedPolicy
from .operating import KVRows, Operating
from .oracle import OraclePolicy
from .percentile import PercentilePolicy
from .random import RandomPolicy
from .settings import (
    DEFAULT_SHARES,
    FADES,
    FULL_KV,
    MODEL_SIGNALS,
    PAGE_ACTIONS,
    PAGE_TOKENS,
    SIGNALS,
    STATS,
    TOKEN_SIGNALS,
    ChunkSettings,
    KVSettings,
    Settings,
    SignalSettings,
)

__all__ = [
    "DEFAULT_SHARES",
    "FADES",
    "FULL_KV",
    "KINDS",
    "MODEL_SIGNALS",
    "PAGE_ACTIONS",
    "PAGE_TOKENS",
    "SIGNALS",
    "STATS",
    "TOKEN_SIGNALS",
    "ChunkSettings",
    "Decision",
    "Fingerprints",
    "FixedPolicy",
    "KVRows",
    "KVSettings",
    "KnobCurve",
    "LatencyTable",
    "LatencyTables",
    "LearnedPolicy",
    "Operating",
    "OraclePolicy",
    "PercentilePolicy",
    "PolicyCheckpoint",
    "RandomPolicy",
    "RankPolicy",
    "Settings",
    "SignalSettings",
    "Summary",
    "adapter_cost",
    "check_budget",
]
