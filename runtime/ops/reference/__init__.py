"""The operations that are spent on every token, in plain PyTorch: what every kernel must equal."""
