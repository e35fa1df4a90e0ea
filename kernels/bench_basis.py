"""How fast random bases are drawn, summed and contracted: `python kernels/bench_basis.py` on the CPU's first thread.

Millions of entries a second, best of several runs: drawn anew, and read from kept lanes. One line per layer of k bases
of [r, in] each, a small one and one of LLaMA-2-7B.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from peftzoo_kernels import basis_coef_grad, basis_expand, basis_lanes, basis_matrix


def rate(entries: int, call: Callable[[], object], runs: int = 20) -> float:
    """Return millions of entries a second of the fastest of `runs` calls."""
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return entries / best / 1e6


def main() -> None:
    """Print one line per size."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    print(f"torch {torch.__version__}; millions of entries a second, one thread")
    for k, r, columns in ((512, 16, 128), (64, 16, 4096)):
        length, coef, grad = r * columns, torch.randn(k), torch.randn(r * columns)
        kept = basis_lanes(1, k, length)
        rates = {
            "sum": rate(k * length, lambda c=coef, n=length: basis_expand(c, 1, n)),
            "gradient": rate(k * length, lambda g=grad, n=k: basis_coef_grad(g, 1, n)),
            "sum, kept": rate(k * length, lambda c=coef, n=length, kept=kept: basis_expand(c, 1, n, kept)),
            "gradient, kept": rate(k * length, lambda g=grad, n=k, kept=kept: basis_coef_grad(g, 1, n, kept)),
            "matrix": rate(k * length, lambda n=k, m=length: basis_matrix(1, n, m, None, cpu, torch.float32)),
        }
        print(f"k {k}, [{r}, {columns}]: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items()))
        few = 2**18 // length
        lanes = rate(few * length, lambda c=few, n=length: basis_lanes(1, c, n))
        print(f"  lanes alone, as many as are drawn at a time: {lanes:.0f}")


if __name__ == "__main__":
    main()
