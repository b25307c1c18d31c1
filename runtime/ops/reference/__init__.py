"""The operations that are spent on every token, in plain PyTorch: what every kernel must equal."""

from .lora import add_lora_, direction_gate

__all__ = ["add_lora_", "direction_gate"]
