"""Every policy on held-out documents, judged by rules that favour none.

scorer     runs a plan over documents for real and adds up measures: the only place that does
hindsight  the oracle
curves     every policy's knob set on validation, measured once on test
verdict    headroom, what was captured, and what is exported
latency    milliseconds of every rung
tradeoff   the figure, the table, TensorBoard
"""
