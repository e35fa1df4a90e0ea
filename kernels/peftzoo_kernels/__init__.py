"""Fused low-rank products for adapter layers.

Each op has a plain-torch reference beside it; `OPS` lists them for the tests and the benchmarks. The package needs
torch and numpy alone: it knows neither peft nor peftzoo.
"""

from peftzoo_kernels._backend import BACKENDS, backend
from peftzoo_kernels._gemm import compute_dtype, mm_float32
from peftzoo_kernels._ops import OPS, Op
from peftzoo_kernels._weight import PackedWeight, Weight, dense
from peftzoo_kernels.basis import basis_coef_grad, basis_expand, basis_lanes, basis_matrix
from peftzoo_kernels.dropout import draw_seed, dropped, keep_mask
from peftzoo_kernels.gather_matmul import gather_matmul, gather_matmul_ref
from peftzoo_kernels.low_rank_linear import (
    LowRankLayer,
    grouped_low_rank_linear,
    grouped_low_rank_linear_ref,
    low_rank_linear,
    low_rank_linear_ref,
)
from peftzoo_kernels.philox import philox, philox_words
from peftzoo_kernels.randlora_linear import (
    merging_is_less_work,
    randlora_delta,
    randlora_linear,
    randlora_linear_ref,
)
from peftzoo_kernels.row_norms import row_norms, row_norms_ref

__all__ = [
    "BACKENDS",
    "OPS",
    "LowRankLayer",
    "Op",
    "PackedWeight",
    "Weight",
    "backend",
    "basis_coef_grad",
    "basis_expand",
    "basis_lanes",
    "basis_matrix",
    "compute_dtype",
    "dense",
    "draw_seed",
    "dropped",
    "gather_matmul",
    "gather_matmul_ref",
    "grouped_low_rank_linear",
    "grouped_low_rank_linear_ref",
    "keep_mask",
    "low_rank_linear",
    "low_rank_linear_ref",
    "merging_is_less_work",
    "mm_float32",
    "philox",
    "philox_words",
    "randlora_delta",
    "randlora_linear",
    "randlora_linear_ref",
    "row_norms",
    "row_norms_ref",
]
