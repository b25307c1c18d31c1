"""What an export is compared with, and the rungs and scales of the policies that are exported."""

import torch

LOGITS = {"atol": 1e-4, "rtol": 0}
CODED_RUNGS = (0.5, 1, 2, 4)
RUNGS, SCALES, COST = (2, 4, 6, 8), (1.3, 0.85, 1.054, 1.0), (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def peft_logits(peft_load, model, folder, tokens):
    return peft_load(model, folder)(tokens).logits
