"""Fused low-rank products for adapter layers.

Each op has a plain-torch reference beside it; `OPS` lists them for the tests and the benchmarks. The package needs
torch alone: it knows neither peft nor peftzoo.
"""

from peftzoo_kernels._backend import BACKENDS, backend
from peftzoo_kernels._ops import OPS, Op
from peftzoo_kernels.gather_matmul import gather_matmul, gather_matmul_ref
from peftzoo_kernels.low_rank_linear import low_rank_linear, low_rank_linear_ref
from peftzoo_kernels.philox import philox, philox_words

__all__ = [
    "BACKENDS",
    "OPS",
    "Op",
    "backend",
    "gather_matmul",
    "gather_matmul_ref",
    "low_rank_linear",
    "low_rank_linear_ref",
    "philox",
    "philox_words",
]
