"""torch.compile: whether the compiler that the launcher asks for works here.

It is asked for by one argument, `accelerate launch --dynamo_backend inductor`, or where there is no
launcher by ACCELERATE_DYNAMO_BACKEND=inductor. accelerate compiles what is trained and evaluated;
checkpoints, samples and the final model are those of the model itself.
"""

from textwrap import shorten

import torch

from .recipe import UsageError


def _twice(x):
    return x * 2


def check_compiler(environ, device, compile=torch.compile):
    """Has inductor make one operation, as it is going to make a model's.

    It writes C++ for CPUs and Triton for GPUs, and what it needs for that is not part of PyTorch.

    Args:
        environ: environment variables as the launcher set them.
        device: what is trained on.
        compile: torch.compile.

    Raises:
        UsageError: it cannot.
    """
    if (environ.get("ACCELERATE_DYNAMO_BACKEND") or "no").lower() != "inductor":
        return
    try:
        # What an earlier compiler left in a cache is no answer.
        compiled = compile(_twice, backend="inductor", options={"fx_graph_cache": False})
        compiled(torch.ones(2, device=device))
    except Exception as error:  # of dynamo, of inductor, of what it starts
        reason = shorten(str(error).strip().split("\n")[0].rstrip("."), 200)
        needed = "g++ or clang++ (CXX says which)" if device.type == "cpu" else "Triton and gcc"
        raise UsageError(
            f"the launcher asks for torch.compile (--dynamo_backend inductor), which does not work "
            f"on this {device.type}: {reason}; install {needed}, or launch with --dynamo_backend "
            "no."
        ) from None
