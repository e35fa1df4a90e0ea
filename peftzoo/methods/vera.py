"""VeRA: shared random matrices, trained scalings (Kopiczko et al. 2024, arXiv:2310.11454); peft's, adopted."""

from __future__ import annotations

from peft import VeraConfig

from peftzoo.core.registry import adopt

adopt(
    "vera",
    config=VeraConfig,
    paper="arXiv:2310.11454",
    lr_factor=10.0,  # x10 of LoRA's rate reaches 99 % on quickstart/dates in 250 steps, x1 none
    injectable=False,  # its matrices are shared between layers and live on peft's model
    summary="Trains scalings between random matrices that all layers share; peft's own.",
    trains=("vera_lambda_b", "vera_lambda_d"),
    aliases={"dropout": "vera_dropout", "seed": "projection_prng_key"},
    tiny={"r": 5, "target_modules": "all-linear"},
)
