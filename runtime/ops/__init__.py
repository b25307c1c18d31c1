"""The operations that are spent on every token, each in plain PyTorch first: `reference` is the specification."""
