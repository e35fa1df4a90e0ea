from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 3
    split: int = 1
