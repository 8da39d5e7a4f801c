"""DeepSpeed's ZeRO under this recipe: its steps, and its state as any other run saves it.

DeepSpeed flattens parameters and cuts them over the processes. What a checkpoint holds is put
together again, so that any number of processes goes on from it, with DeepSpeed or without.
"""

import contextlib

import torch
from accelerate.utils import DistributedType

from .recipe import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALL = 1 << 16  # elements of a parameter that is gathered to be looked at


def is_zero(accelerator):
    """Whether accelerate trains with DeepSpeed."""
    return getattr(accelerator, "distributed_type", None) == DistributedType.DEEPSPEED


def small_parameters(model):
    """A context in which ZeRO-3's processes all see gates and the like, which it keeps in parts."""
    parameters = [p for p in model.parameters() if 0 < getattr(p, "ds_numel", 0) < SMALL]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def gather_by_block(model):
    """Makes a block what ZeRO-3 gathers at a time, as FSDP does.

    It would gather for every call of every module, and a process whose text has fewer windows or
    segments makes fewer calls than the others: they would wait for one another for ever.
    """
    from deepspeed.utils import set_z3_leaf_modules

    blocks = {type(x) for x in model.modules() if type(x).__name__ in model._no_split_modules}
    set_z3_leaf_modules(model, list(blocks))


class Zero:
    """A model and its optimizer in DeepSpeed's hands.

    Args:
        accelerator: of accelerate, which was asked for DeepSpeed.
        model: the language model.
        optimizer: of torch.
        recipe: of the run.
    """

    def __init__(self, accelerator, model, optimizer, recipe):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        size, _ = recipe.windows_per_process(accelerator.num_processes)
        config["train_micro_batch_size_per_gpu"] = size
        config["gradient_clipping"] = recipe.gradient_clip
        # torch's own Adam runs on a CPU too: DeepSpeed's would be compiled first, and rounds apart.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3 and recipe.replay_segment_length:
            raise UsageError(
                "replay_segment_length runs layers again in backward, where ZeRO-3 has taken their "
                "weights away; use --gradient_checkpointing true, or replay under DDP."
            )
        for key in ("skip_spikes", "ema_decay"):
            if getattr(recipe, key):
                raise UsageError(
                    f"{key} needs the gradient before the update and the weights after it, which "
                    "DeepSpeed keeps to itself; set it to 0, or launch with FSDP or DDP."
                )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        if self.stage == 3:
            gather_by_block(model)
        self.engine, self.wrapped = accelerator.prepare(model, optimizer)
        self.optimizer = self.wrapped.optimizer  # DeepSpeed's, around torch's

    def backward(self, loss, last):
        """Adds to the gradient, over processes at the last micro-batch."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def step(self):
        """Clips, updates, and returns the norm that the gradient had."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def optimizer_state(self):
        """The optimizer's state by parameter, as torch.distributed.checkpoint names it.

        Returns:
            In the main process; other processes take part in gathering it and get None.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        is_main, state = torch.distributed.get_rank() == 0, {}
        step = next(iter(self._flat_states().values())).get("step")
        for name, parameter in self.engine.module.named_parameters():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if is_main and step is not None:
                state[name] = {key: x.cpu().clone() for key, x in moments.items()}
                state[name]["step"] = step.detach().cpu().clone()
        if not is_main:
            return None
        return {"state": state, "param_groups": self._groups}

    def load_optimizer_state(self, saved):
        """Takes up what `optimizer_state` returned in any run."""
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        states = saved["state"]
        step = next(iter(states.values()))["step"]
        for flat, state in self._flat_states().items():
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(flat))
            state["step"] = step.clone()
        self._link()
        rank = torch.distributed.get_rank()
        for name, parameter in self.engine.module.named_parameters():
            for key in MOMENTS:
                value = states[name][key].to(parameter.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                own = torch.zeros_like(safe_get_local_optimizer_state(parameter, key))
                part = value.flatten()[rank * own.numel() :][: own.numel()]  # the last is padded
                own.flatten()[: part.numel()].copy_(part)
                safe_set_local_optimizer_state(parameter, own, key)

    def _flat_states(self):
        parts = self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else None
        parts = parts or self.optimizer.single_partition_of_fp32_groups
        return {part: self.optimizer.optimizer.state[part] for part in parts}

    def _link(self):
        # DeepSpeed finds the state of each parameter in the flat one after the first group has
        # stepped, when that of the others is not there yet.
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
