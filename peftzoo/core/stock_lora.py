"""StockLora: what a registration says about a method that stock peft can run as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_FACTORS = MappingProxyType({"lora_A.weight": "a", "lora_B.weight": "b"})


@dataclass(frozen=True)
class StockLora:
    """How the folder of a method of the LoRA family looks to stock peft.

    Attributes:
        flags: settings of peft's `LoraConfig` that are true for it, such as `use_dora`.
        extra: tensors that it has beside its two factors: end of peft's key -> the method's name.
        reads: a stock folder with these flags is read as this method, if no other is asked for.
    """

    flags: frozenset[str] = frozenset()
    extra: Mapping[str, str] = field(default_factory=dict)
    reads: bool = False

    @property
    def tensors(self) -> Mapping[str, str]:
        """Every tensor of a layer: end of peft's key -> the method's name."""
        return {**_FACTORS, **self.extra}
