"""peft's LoRA layer on a 4-bit weight with our forward; a file of its own, because it needs bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit

from peftzoo.core.stock_layers import FusedStock


class FusedLinear4bit(FusedStock, Linear4bit):
    """peft's `lora.bnb.Linear4bit` with the fused forward."""

    stock = Linear4bit
