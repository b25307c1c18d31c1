"""Where a token's rung is decided: signals, the state machine, and the stream of a batch of rows.

    signals     tensors in, numbers in [0, 1] out
    state       what a row remembers between tokens
    machine     when a chunk opens, what the policy sees, which rung weights follow; of which
      known       is what an opening sees
      recurrence  is what depends on the token before
      bucket      keeps the budget
    stream      a batch on its way through the model, block by block
    record      what was spent (running sums) and, on request, everything that was decided

Knows nothing of transformers and never waits for the device.
"""
