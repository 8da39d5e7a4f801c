"""recipes/pretrain.py where accelerate takes CPUs for GPUs: it ignores FSDP and DeepSpeed there."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import pretrain

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    os.environ["DS_ACCELERATOR"] = "cpu"
    # It would compile its own communication, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.accelerator.is_available = lambda: True
pretrain.main()
