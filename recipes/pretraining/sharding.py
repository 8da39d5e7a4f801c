"""Models in shards (FSDP2): what accelerate does not do as this recipe means it."""

import types

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .launching import is_on
from .recipe import UsageError
from .zero import is_zero


def check_plugin(environ, accelerator, recipe):
    """Refuses a launch that asks for shards where there will be none, or another gradient.

    Args:
        environ: environment variables as the launcher set them.
        accelerator: of accelerate, made from them.
        recipe: of the run.

    Raises:
        UsageError: accelerate ignores what was asked for; a recipe that shards would train wrong.
    """
    if is_on(environ.get("ACCELERATE_USE_FSDP")) and not accelerator.is_fsdp2:
        raise UsageError(
            "the launcher asks for FSDP, which accelerate ignores on "
            f"{accelerator.num_processes} x {accelerator.device.type} (it needs several GPUs); "
            "launch with --config_file recipes/accelerate/ddp.yaml, or one process without a file."
        )
    if is_on(environ.get("ACCELERATE_USE_DEEPSPEED")) and not is_zero(accelerator):
        raise UsageError(
            "the launcher asks for DeepSpeed, which accelerate ignores on "
            f"{accelerator.num_processes} x {accelerator.device.type} (it needs GPUs); launch with "
            "--config_file recipes/accelerate/ddp.yaml, or one process without a file."
        )
    if is_zero(accelerator):
        # Else from_pretrained hands out weights in parts, which have no shape to decay them by.
        unset_hf_deepspeed_config()
    if accelerator.is_fsdp2 and recipe.replay_segment_length:
        raise UsageError(
            "replay_segment_length runs layers again in backward, where FSDP has taken their "
            "weights away; use --gradient_checkpointing true with FSDP, or replay under DDP."
        )


def prepare(accelerator, model, optimizer, bf16):
    """accelerate's `prepare`, with the same arithmetic in shards as in whole models.

    FSDP2's own mixed precision rounds every weight to 16 bits, decays and norms among them, and the
    residual stream between blocks. Here weights are gathered in float32, and autocast chooses what
    is computed in bf16, as it does without shards.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if bf16:
        run_in_bf16(model, accelerator.device)
    return accelerator.prepare(model, optimizer)


def run_in_bf16(model, device):
    """Makes a model's forward pass choose what is computed in bf16."""
    autocast = torch.autocast(device.type, torch.bfloat16)
    model.forward = types.MethodType(autocast(type(model).forward), model)
