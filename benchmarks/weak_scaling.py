"""One process of several that share a pass, each over as much text; run by `bench_corpus.py`.

The first prints the tokens per second of all, from when the last was ready to when the last ended.
"""

from __future__ import annotations

import sys
import time

import torch
import torch._dynamo  # before there is a group, which it would keep: see lapefast/cli/processes.py
import torch.distributed as dist
from models import SHAPES, TINY, build

import lapefast as lf

_BATCHES = 4  # of each process


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    shape = TINY if quick else SHAPES["cpu"]
    model = build(shape, "cpu").model
    rows = _BATCHES * dist.get_world_size()
    torch.manual_seed(1)
    ids = torch.randint(shape.vocabulary, (rows, shape.length))
    once = {"process_group": dist.group.WORLD, "batch_size": 1, "progress": False}
    lf.profile(model, {"en": ids[: dist.get_world_size(), :16]}, **once)  # warm
    dist.barrier()
    begin = time.perf_counter()
    profile = lf.profile(model, {"en": ids}, **once)
    dist.barrier()
    seconds = time.perf_counter() - begin
    assert int(profile.tokens) == ids.numel()
    if dist.get_rank() == 0:
        print(ids.numel() / seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--quick" in sys.argv)
