"""KaSA: LoRA with singular values, on a truncated base (Wang et al. 2024, arXiv:2412.06071); peft's, adopted.

    y = x W_k^T + (alpha / r) ((x A^T) * s) B^T,   W_k = W without its r smallest singular components.

peft's LoRA tuner runs it (`LoraConfig(kasa_config=...)`) and leaves the two regularisers of the paper to the trainer:
beta |s|^2 + gamma (|B^T B - I|_F + |A A^T - I|_F), summed over layers.
"""

from __future__ import annotations

from peft import KasaConfig, LoraConfig

from peftzoo.core.registry import adopt

adopt(
    "kasa",
    config=LoraConfig,
    paper="arXiv:2412.06071",
    summary="Trains a LoRA with singular values between its factors, on a truncated base; peft's own.",
    lr_factor=2.0,  # on quickstart/dates x2 of LoRA's rate reaches 100 %, x1 97 %
    trains=("lora_A", "lora_B", "lora_diag"),
    layers=("linear",),
    edits_base="always",
    keeps_base=False,  # what it cuts off is gone: load the base again
    fsdp=False,
    regularizer=lambda tuner: tuner._get_kasa_loss(),
    aliases={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    offers=(
        *("r", "lora_alpha", "lora_dropout", "kasa_config", "target_modules", "exclude_modules", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    ),
    preset={"kasa_config": KasaConfig()},
    tiny={"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
)
