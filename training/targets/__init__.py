"""What a rung costs in quality, token by token, and what a decision would have seen there: what a policy learns from.

damage    KL of every rung, from uniform runs; trajectories; what reaches later tokens through the cache
samples   both together, chunk by chunk
collect   the same on any number of devices, in resumable `shards`
"""
