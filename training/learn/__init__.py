"""From samples to a policy: the Lightning `module`, the rounds that `train` it, what is `calibrate`d from data."""
