"""MiSS: one small matrix that all groups of inputs share (Kang and Yin 2024, arXiv:2409.15371); peft's, adopted.

With the input in groups of r features,

    h_j = sum_g x_(g r + j),    y = x W^T + h D,    D [r, out] = 0 at the start.
"""

from __future__ import annotations

from peft import MissConfig

from peftzoo.core.registry import adopt

adopt(
    "miss",
    config=MissConfig,
    paper="arXiv:2409.15371",
    summary="Trains one matrix that all groups of r input features share; peft's own.",
    trains=("miss_block",),
    layers=("linear", "bnb-4bit", "bnb-8bit"),
    aliases={"dropout": "miss_dropout"},
    tiny={"r": 4, "target_modules": "all-linear"},
)
