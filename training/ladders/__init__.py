"""How a ladder is built: which directions matter, in how many bits each is written, and what that loses.

effects    what a direction does to the loss, from backward passes over a few texts
allocate   effects -> how precisely every rung reads every direction
build      an adapter and texts -> a ladder of one of the kinds
distil     its lower rungs, trained through the rounding to put out what the exact adapter does
quality    what a ladder's rungs, and other compressed adapters, lose on held-out documents
baselines  the others: truncated, rounded, LoRAQuant
compare    both beside each other at equal bytes, as numbers and as a picture
"""
