"""What a decode step of the engine takes with the user's own model and adapter, at every rung, by batch bucket.

    steps       the measurement: one graph a bucket, in which the rung is switched as it is in serving
    __main__    `python -m runtime.measure`, which writes what `training.fit --latency` reads

Nothing is imported here: `steps` needs Triton, and the command must be able to say that there is no GPU without it.
"""
