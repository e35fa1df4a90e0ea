"""Compile every shipped kernel configuration ahead of time, for GPUs that need not be there, and list what each takes.

    python kernels/aot.py [--write] [--only TEXT]

Each case calls a product on tensors of the meta device; the launch that it would make is compiled instead of made.
Registers, spilled bytes and shared memory are checked against what the target has, since a compile that succeeds may
still be one that no GPU can launch, and compared with the checked-in table `kernels/aot.json`, so that no change goes
unseen; `--write` writes it. Another Triton version compiles otherwise: its figures are checked, not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from peftzoo_kernels import _triton
from peftzoo_kernels.dispatch import Sizes, candidates
from peftzoo_kernels.down_grad import down_grad
from peftzoo_kernels.expand import expand
from peftzoo_kernels.frozen_product import frozen_product
from peftzoo_kernels.row_norms import row_norms
from peftzoo_kernels.shrink import shrink
from peftzoo_kernels.up_grads import up_grads

TABLE = Path(__file__).with_name("aot.json")
M, K, N = 8192, 4096, 14336
RANKS = (16, 64, 256)


class Target(NamedTuple):
    """A GPU, what one program may take of it, and the instruction of its matrix units."""

    gpu: GPUTarget
    shared: int  # bytes
    registers: int  # a thread
    matrix: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, 255, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, 255, "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, 255, "tcgen05.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, 512, "v_mfma"),
}
# a program's stack on sm_100 holds a few bytes that are no spill of a loop
SPILLED_AT_MOST = {"sm_100": 16}


def cases(target: str) -> dict[str, Callable[[], Any]]:
    """Return every configuration that is shipped for a target, as a call that launches it."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found: dict[str, Callable[[], Any]] = {}
    seed, wide = empty(dtype=torch.int64), torch.float32
    for r in RANKS:
        x, g, w = empty(M, K), empty(M, N), empty(N, K)
        u, a, b, row = empty(M, r), empty(r, K, dtype=wide), empty(N, r, dtype=wide), empty(N, dtype=wide)
        calls: dict[Sizes, Callable[..., Any]] = {
            Sizes("shrink", M, K, 0, r, x.dtype): partial(shrink, x, a),
            Sizes("shrink", M, K, 0, r, x.dtype, True): partial(shrink, x, a, 0.05, seed),
            Sizes("expand", M, 0, N, r, x.dtype): partial(expand, u, b, row),
            Sizes("expand", M, 0, K, r, x.dtype, True): partial(expand, u, a.t(), None, 0.05, seed),
            Sizes("down_grad", M, K, 0, r, x.dtype): partial(down_grad, u, x),
            Sizes("down_grad", M, K, 0, r, x.dtype, True): partial(down_grad, u, x, 0.05, seed),
            Sizes("up_grads", M, 0, N, r, x.dtype): partial(up_grads, g, b, u, row, g),
            Sizes("up_grads", M, 0, K, r, x.dtype): partial(up_grads, x, a.t(), u),
            Sizes("frozen_product", M, K, N, r, x.dtype): partial(frozen_product, x, w, u, b, row, row, True),
            Sizes("frozen_product", M, N, K, r, x.dtype): partial(frozen_product, g, w.t(), u, a.t()),
            Sizes("row_norms", N, K, 0, r, x.dtype): partial(row_norms, w, a, b, 0.5),
        }
        for sizes, call in calls.items():
            for tiles in candidates(sizes, target):
                what = f"{sizes.product}{' dropped' if sizes.drops else ''} k={sizes.k} n={sizes.n} r={r}"
                cut = f"{tiles.m}x{tiles.n}x{tiles.k} warps={tiles.warps} stages={tiles.stages} split={tiles.split}"
                found[f"{what}: {cut}"] = partial(call, tiles=tiles)
    return found


def build(case: str, target: str) -> dict[str, Any]:
    """Compile what a case launches for a target and return what it takes, and its fastest matrix instruction."""
    _triton.launches = []
    cases(target)[case]()
    ((kernel, _, args, meta),) = _triton.launches
    _triton.launches = None
    types, constants, attributes = specialised(kernel, args, meta)
    source = ASTSource(kernel, types, constants, attributes)
    gpu = TARGETS[target].gpu
    compiled = compile_kernel(source, gpu, {key: meta[key] for key in ("num_warps", "num_stages")})
    text = compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    matrix = next((one for one in ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma") if one in text), None)
    found = {"shared": compiled.metadata.shared, "matrix": matrix}
    if gpu.backend == "cuda":
        return found | cubin_takes(compiled.asm["cubin"])
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    return found | {"registers": int(counts["vgpr_count"]), "spilled": 4 * int(counts["vgpr_spill_count"])}


def specialised(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
    """Return types, constants and divisibility of the arguments as a launch would specialise them."""
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        value = args[place] if place < len(args) else meta[name]
        if isinstance(value, Tensor):
            types[name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
        elif place >= len(args) or (isinstance(value, int) and value == 1):
            types[name], constants[(place,)] = "constexpr", value
            continue
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def cubin_takes(cubin: bytes) -> dict[str, int]:
    """Return registers a thread and spilled bytes of a CUDA binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(numbers["REG"]), "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"])}


def misfits(case: str, target: str, takes: dict[str, Any]) -> list[str]:
    """Return what does not fit the target."""
    limits = TARGETS[target]
    bounds = {"shared": limits.shared, "registers": limits.registers, "spilled": SPILLED_AT_MOST.get(target, 0)}
    found = [f"{takes[name]} {name} > {bound}" for name, bound in bounds.items() if takes[name] > bound]
    if case.startswith("frozen_product") and takes["matrix"] != limits.matrix:
        found.append(f"{takes['matrix']} is not {limits.matrix}")
    return found


def _build(job: tuple[str, str]) -> dict[str, Any]:
    return build(*job)


def main() -> None:
    """Compile, check, compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    options = parser.parse_args()
    jobs = [(case, target) for target in TARGETS for case in cases(target) if options.only in case]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    problems = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (case, target), takes in zip(jobs, pool.map(_build, jobs), strict=True):
            table.setdefault(case, {})[target] = takes
            problems += [f"{case} on {target}: {misfit}" for misfit in misfits(case, target, takes)]
            print(f"{target:7} {takes}  {case}", flush=True)
    version = triton.__version__
    if options.write and not problems:
        TABLE.write_text(json.dumps({"triton": version, "cases": table}, indent=1) + "\n")
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "cases": {}}
    if known["triton"] == version:
        changed = [case for case in table if known["cases"].get(case) != table[case]]
        gone = [] if options.only else [case for case in known["cases"] if case not in table]
        problems += [f"{case}: not what {TABLE.name} says; look at it and run with --write" for case in changed + gone]
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
