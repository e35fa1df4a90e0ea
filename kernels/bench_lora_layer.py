"""Cost of a LoRA layer over its frozen layer: peft's and ours, forward + backward, alternating.

    python kernels/bench_lora_layer.py [--rows 2048] [--features 1024] [--rank 16] [--rounds 60]

All candidates take turns within one process, in an order that rotates, so that a busy machine slows all alike; what
counts is the ratio of the overheads, printed first. Gradients must be finite and not zero.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads

import peft
import torch
from torch import Tensor, nn

import peftzoo


def candidates(features: int, rank: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return {name: layer}, all on the same frozen weight and the same factors."""
    torch.manual_seed(0)
    frozen = nn.Linear(features, features, bias=False, device=device, dtype=dtype).requires_grad_(False)

    def shared() -> nn.Linear:
        layer = nn.Linear(features, features, bias=False, device="meta")
        layer.weight = frozen.weight
        return layer

    stock = peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]), nn.Sequential(shared())
    )[0]
    zoo = peftzoo.attach(shared(), peftzoo.LoraConfig(r=rank, alpha=2.0 * rank))
    adapter = zoo.adapter("default")
    with torch.no_grad():
        adapter.b.normal_()
        stock.lora_A["default"].weight.copy_(adapter.a)
        stock.lora_B["default"].weight.copy_(adapter.b)
    return {"frozen": frozen, "peft": stock, "zoo": zoo}


def timed(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the seconds of one forward and backward."""
    for parameter in (x, *layer.parameters()):
        parameter.grad = None
    synchronize(x)
    start = time.perf_counter()
    layer(x).backward(dy)
    synchronize(x)
    return time.perf_counter() - start


def synchronize(x: Tensor) -> None:
    """Wait for the device of `x`."""
    if x.is_cuda:
        torch.cuda.synchronize()


def check(layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Raise unless ours and peft's agree and every gradient is finite and not zero."""
    results = {}
    for name in ("peft", "zoo"):
        timed(layers[name], x, dy)
        gradients = [p.grad for p in layers[name].parameters() if p.requires_grad]
        results[name] = [layers[name](x).detach(), x.grad, *gradients]
        if not all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in results[name]):
            raise SystemExit(f"{name}: a gradient is missing, zero or not finite")
    bound = 1e-4 if x.dtype == torch.float32 else 3e-2
    for one, other in zip(results["peft"], results["zoo"], strict=True):
        if (one.float() - other.float()).norm() > bound * one.float().norm():
            raise SystemExit("ours and peft's results differ")


def median_seconds(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of each run; every round takes all of them, starting with another one."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 5):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            elapsed = runs[name]()
            if turn >= 5:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure and print one line per candidate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="tokens, M")
    parser.add_argument("--features", type=int, default=1024, help="in and out features, K = N")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = candidates(options.features, options.rank, device, dtype)
    x = torch.randn(options.rows, options.features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(options.rows, options.features, device=device, dtype=dtype)
    check(layers, x, dy)

    seconds = median_seconds(
        {name: lambda layer=layer: timed(layer, x, dy) for name, layer in layers.items()}, options.rounds
    )
    overhead = {name: value - seconds["frozen"] for name, value in seconds.items()}
    print(f"zoo overhead / peft overhead: {overhead['zoo'] / overhead['peft']:.2f}")
    for name, value in seconds.items():
        print(f"{name:7} {1e3 * value:8.2f} ms   {100 * overhead[name] / seconds['frozen']:+6.1f} % over frozen")
    print(
        f"M={options.rows} K=N={options.features} r={options.rank} {str(dtype).removeprefix('torch.')} on {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}, "
        f"median of {options.rounds} alternating rounds"
    )


if __name__ == "__main__":
    main()
