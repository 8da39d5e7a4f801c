"""What a script of one of several processes does first and last."""

import sys
import traceback

import torch
import torch.distributed as dist


def run_as_process(main):
    """Calls `main(rank, size, out, *names)` of a script as `RANK SIZE STORE OUT *names` says.

    What fails is told, and ends the process with 1: the others are waiting for it.
    """
    rank, size, store, *arguments = sys.argv[1:]
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        main(rank, size, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
