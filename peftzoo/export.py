"""Taking an adapter elsewhere: merged into its base, or as a plain LoRA that serves anywhere.

Both are reopened after they are written, and the logits of what was written are compared with the adapter's.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftzoo import builtin
from peftzoo.core.config import ZooConfig
from peftzoo.core.lora_folder import write_lora_folder
from peftzoo.core.storage import load_adapter, read_config
from peftzoo.errors import ModelError, RecipeError

_PROBE_TOKENS = 32
# what writing and reading may change in float32 arithmetic, relative to the largest logit
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        folder: where it is.
        change: largest difference between the adapter's logits and those of what was written, on a probe.
        scale: largest logit of the probe, which `change` has to be seen against.
        error: of a plain LoRA of a given rank: |its update - the adapter's| / |the adapter's|, Frobenius norms over
            all layers; 0 where it is the same update.
    """

    folder: Path
    change: float
    scale: float
    error: float = 0.0


def export_merged(adapter: Path, out: Path, base: str | None = None) -> Export:
    """Write the base model with the adapter merged into its weights, with its tokenizer.

    The base is merged in the precision it was saved in, so `change` shows what that rounding does.

    Args:
        adapter: the adapter's folder.
        out: folder to write; must be free.
        base: name or folder of the base model; None takes the one the adapter names.

    Raises:
        ModelError: the adapter or the base cannot be loaded, or what was written does not give the same logits.
        RecipeError: `out` holds something.
    """
    place = _prepare(adapter, out, base)
    model = load_adapter(_load(place, dtype="auto"), adapter)
    want = _probe(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(out)
    with suppress(OSError, ValueError):  # a base without a tokenizer is merged without one
        AutoTokenizer.from_pretrained(place).save_pretrained(out)
    half = merged.dtype in (torch.bfloat16, torch.float16)
    return _compared(out, _probe(_load(out, dtype="auto")), want, tolerance=0.1 if half else _TOLERANCE)


def export_lora(adapter: Path, out: Path, base: str | None = None, rank: int | None = None) -> Export:
    """Write the adapter as a stock peft LoRA folder: with the same outputs, or as the nearest of a given rank.

    Args:
        adapter: the adapter's folder.
        out: folder to write; must be free.
        base: name or folder of the base model; None takes the one the adapter names.
        rank: rank of the plain LoRA that comes nearest to the adapter; None writes the adapter as it is.

    Raises:
        ModelError: the adapter is not low-rank and no rank was given, it cannot be loaded, or what was written does
            not give the same logits although it has the same update.
        RecipeError: `out` holds something.
    """
    place = _prepare(adapter, out, base)
    model = load_adapter(_load(place, dtype=torch.float32), adapter)
    if not isinstance(model.peft_config["default"], ZooConfig):
        raise ModelError(f"{adapter}: peft's {read_config(adapter)['peft_type']} adapters are converted with peft")
    want = _probe(model)
    error = write_lora_folder(model, out, rank=rank)
    got = _probe(PeftModel.from_pretrained(_load(place, dtype=torch.float32), out))
    same = error <= _TOLERANCE
    return replace(_compared(out, got, want, _TOLERANCE if same else math.inf), error=error)


def _prepare(adapter: Path, out: Path, base: str | None) -> str:
    """Return the base model's place, after the checks that need no model."""
    config = read_config(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} is not empty; name a new folder")
    place = base or config.get("base_model_name_or_path")
    if not place:
        raise ModelError(f"{adapter} does not say which base it belongs to; name it with --base")
    if place.startswith("builtin/"):
        try:
            return str(builtin.model_path(place.removeprefix("builtin/")))
        except KeyError as error:
            raise ModelError(f"base {place}: {error.args[0]}") from None
    return str(place)


def _load(place: str | Path, dtype: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"base {place} cannot be loaded: {reason}. Name another with --base") from error


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Return the logits of a fixed run of tokens, [1, tokens, vocabulary] float32."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(_PROBE_TOKENS) * 7919 % vocabulary).unsqueeze(0).to(model.device)
    return model.eval()(tokens).logits.float()


def _compared(out: Path, got: Tensor, want: Tensor, tolerance: float) -> Export:
    change, scale = (got - want).abs().max().item(), want.abs().max().item()
    if not change <= tolerance * scale:
        raise ModelError(f"{out} does not give the adapter's logits: off by {change:.3g} of up to {scale:.3g}")
    return Export(out, change, scale)
