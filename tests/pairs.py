"""Two processes of one group, for what a single one cannot show."""

from __future__ import annotations

import subprocess
import sys

from processes import ROOT, environment

_OPENING = """\
import sys
import torch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
"""


def run_pair(script, folder):
    """Run `script` as process 0 and 1 of two, where `rank` and `folder` are known and the test files importable."""
    path = folder / "pair.py"
    path.write_text(f"{_OPENING}{script}\ntorch.distributed.destroy_process_group()\n")
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(folder)],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [one.communicate(timeout=400)[0] for one in pair]
    finally:
        for one in pair:
            one.kill()
    assert [one.returncode for one in pair] == [0, 0], "\n".join(text[-2000:] for text in said)
