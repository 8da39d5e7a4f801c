"""recipes/pretrain.py where accelerate takes CPUs for GPUs: on CPUs it ignores FSDP."""

from accelerate.utils import DistributedType

import pretrain
from accelerate import PartialState

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
pretrain.main()
