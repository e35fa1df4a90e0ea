"""Compile every shipped kernel configuration ahead of time, for GPUs that need not be there, and list what each takes.

    python kernels/aot.py [--write] [--only TEXT]

Each case calls a launcher on tensors of the meta device; the launches that it would make are compiled instead of run.
Reports registers, spilled bytes and shared memory by kernel, case and target, refuses what does not fit the target,
and fails if the result is not the checked-in table `kernels/aot.json` (of this Triton version); `--write` writes it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TABLE = Path(__file__).with_name("aot.json")


class Limits(NamedTuple):
    """What one program may take on a target."""

    target: GPUTarget
    shared: int  # bytes
    registers: int  # a thread


LIMITS = {
    "sm_80": Limits(GPUTarget("cuda", 80, 32), 166_912, 255),
    "sm_90": Limits(GPUTarget("cuda", 90, 32), 232_448, 255),
    "sm_100": Limits(GPUTarget("cuda", 100, 32), 232_448, 255),
    "gfx942": Limits(GPUTarget("hip", "gfx942", 64), 65_536, 512),
}


class Launch(NamedTuple):
    """One launch that was recorded in place of being made."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility of the arguments, as Triton's own launcher would specialise them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
            attributes[(place,)] = divisible
        elif value is None or (value == 1 and not isinstance(value, float)):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = divisible
        else:
            types[name] = "fp32"
    for name in launch.kernel.arg_names[len(launch.args) :]:
        types[name], constants[name] = "constexpr", launch.meta[name]
    return types, constants, attributes


def build(launch: Launch, limits: Limits) -> dict[str, int]:
    """Compile one launch and return what it takes."""
    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    options = {key: launch.meta[key] for key in ("num_warps", "num_stages")}
    compiled = compile(source, target=limits.target, options=options)
    found = {"shared": compiled.metadata.shared}
    if limits.target.backend == "cuda":
        return found | cubin_resources(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    found["spilled"] = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return found


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Return registers a thread and spilled bytes of a CUDA binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {"registers": int(numbers["REG"]), "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"])}
