"""Every policy on held-out documents, judged by rules that favour none.

scorer     runs a plan over documents for real and adds up measures: the only place that does
hindsight  the oracle
curves     every policy's knob set on validation, measured once on test
worth      the fixed rungs of plain truncation beside those of the ladder in use
equal_rank every curve read at the mean rank of the fixed rungs, as measured and on resampled documents
verdict    headroom, what was captured, how far from the fixed rungs, and what is exported
latency    milliseconds of every rung on the reference path
figure     what is exported and by how much, in one picture, and KL over milliseconds in another
tradeoff   the table, the summary, TensorBoard
"""
