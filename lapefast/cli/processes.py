"""The processes that torchrun started a command as."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["process_group"]


@contextmanager
def process_group() -> Iterator[ProcessGroup | None]:
    """The group of all processes that torchrun started; None for a command started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch

    # What of torch is first imported while a default group exists can keep that group, as default
    # arguments do. Its threads then outlive the interpreter, and one that still has a tensor of
    # Python's to let go aborts the process (seen with torch 2.13 and gloo).
    import torch._dynamo
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first one may fill the token cache while the others wait.
    dist.init_process_group(
        timeout=timedelta(days=1)
    )  # gloo for tensors on the CPU, NCCL for those on GPUs
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
