"""Ahead-of-time compiles of every shipped kernel configuration, on GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_shipped_configuration_fits_its_targets():
    """Registers, spills, shared memory and matrix instructions are those of kernels/aot.json, and within bounds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run(
        [sys.executable, ROOT / "kernels/aot.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
