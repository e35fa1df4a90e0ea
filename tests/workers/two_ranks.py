"""One of two processes that train every named method under DDP and FSDP2; the first writes what came out.

Usage: RANK=0|1 python two_ranks.py FOLDER METHOD...
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import make_llama, take_steps, trained_values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_runs import MICRO_BATCHES, RATE, STEPS, started

import peftzoo


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def run(method, llama, wrap):
    """Return the losses and the trained tensors of a run on this rank's half of each batch."""
    model = wrap(started(method, llama, seed=dist.get_rank()))
    halves = [batch.chunk(2)[dist.get_rank()] for batch in STEPS]
    losses = torch.tensor(take_steps(model, halves, RATE, MICRO_BATCHES))
    dist.all_reduce(losses)
    return {"losses": (losses / 2).tolist(), "tensors": trained_values(model)}


def main(folder, names):
    rank = int(os.environ["RANK"])
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timeout)
    llama = make_llama()
    for name in names:
        results = {}
        for wrap in (ddp, fsdp):
            try:
                results[wrap.__name__] = run(peftzoo.get_method(name), llama, wrap)
            except Exception:  # the test of this method says so; the others go on
                results[wrap.__name__] = {"error": traceback.format_exc()}
        torch.save(results, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
