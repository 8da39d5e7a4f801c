"""What a run computes in: "fp32", or "bf16" where autocast says so. On a CPU "auto" measures.

A CPU may have instructions for bf16 and be slower with them, so products such as training has are
timed in both. A run decides once: what it was decided lies in run.json and in its checkpoints, and
a continuation takes it from there.
"""

import time
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear

from .agreeing import gather
from .recipe import UsageError
from .run_folder import read_record

GAIN = 1.1  # times as fast: less is not worth the digits that bf16 does not have, nor beyond noise
FLOPS = 4e9  # of a timed product, at most: some hundredths of a second of a core
FEW_TOKENS = 1024  # with so many, converting a weight is a small part of a product with it
SECONDS, ROUNDS = 0.4, (4, 20)  # that are timed in all, and how many rounds that may be


@dataclass
class Precision:
    """What a run computes in.

    Attributes:
        name: "fp32" or "bf16"; "" as long as nobody has measured.
        seconds: the same -> seconds of a product in it; {} where nobody did.
    """

    name: str
    seconds: dict = field(default_factory=dict)


def has_bf16(device):
    """Whether a device has instructions for bf16; every CPU can emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return True


def precision_of(requested, device, launched="", kept=None):
    """What was asked for, what the run began with, or what a device is known to be fastest in.

    Args:
        requested: the recipe's precision.
        device: what is trained on.
        launched: of the launcher (ACCELERATE_MIXED_PRECISION), which says "no" unasked.
        kept: the `Precision` of the run that is continued, None if there is none.

    Returns:
        A `Precision`. Its name is empty where "auto" has to measure: in a new run on a CPU.

    Raises:
        UsageError: bf16 asked of a device without it, another precision asked by the launcher.
    """
    launched, current = launched.lower(), requested
    if requested == "auto" and kept:
        current = kept.name
    if launched not in ("", "no", "bf16") or (launched == "bf16" and current == "fp32"):
        of_run = f', and the run began in "{current}"' if current != requested else ""
        raise UsageError(
            f'the launcher asks for mixed precision {launched!r}, the recipe for "{requested}"'
            f'{of_run}; launch with --mixed_precision no, and say --precision "fp32", "bf16" or '
            '"auto".'
        )
    if kept and requested in ("auto", kept.name):
        return kept
    if launched == "bf16":
        requested = "bf16"
    if requested == "bf16" and not has_bf16(device):
        raise UsageError(f'this {device.type} has no bf16; use --precision "fp32" or "auto".')
    if requested == "auto" and device.type == "cpu":
        return Precision("")
    return precision_by_instructions(requested, device)


def precision_by_instructions(requested, device):
    """What was asked for, or "bf16" where a device has instructions for it."""
    return Precision("bf16" if requested != "fp32" and has_bf16(device) else "fp32")


def kept_precision(run_dir, manifest, device):
    """The `Precision` of a run that is continued; None if nothing is known of it.

    Args:
        run_dir: the run's folder.
        manifest: of its checkpoint, {} if there is none.
        device: what it goes on on.
    """
    for record in (manifest, read_record(run_dir)):
        if record.get("precision") in ("fp32", "bf16"):
            return Precision(record["precision"], record.get("precision_seconds") or {})
    if not manifest:
        return None
    # Its run.json is lost, and its checkpoint is of a version that went by instructions alone.
    return precision_by_instructions(manifest["recipe"].get("precision", "auto"), device)


def product_of(recipe, config, num_processes):
    """Tokens, width of the model and of its MLP: the largest products of a step of a process.

    Args:
        recipe: of the run.
        config: of its model.
        num_processes: of the run.
    """
    windows, _ = recipe.windows_per_process(num_processes)
    tokens = windows * recipe.sequence_length // recipe.sequence_parallel
    return max(tokens, 1), config.hidden_size, config.intermediate_size


def settle(precision, product, device, is_first=True, gather=gather):
    """Measures if that is what is left to do: the first process does, and all take what it found.

    Args:
        precision: of `precision_of`.
        product: of `product_of`.
        device: what is trained on.
        is_first: whether this is the first process of all.
        gather: (value) -> the values of all processes, by rank.

    Returns:
        A `Precision` with a name, the same in all processes.
    """
    if precision.name:
        return precision
    if not all(gather(has_bf16(device))):  # in one of them it would be emulated
        return Precision("fp32")
    return gather(measure(product) if is_first else None)[0]


def measure(product, say=print):
    """The `Precision` that is faster on this CPU, which is said in a line.

    Args:
        product: of `product_of`.
        say: prints a line.
    """
    seconds = time_product(*product)
    precision = faster(seconds)
    other = "bf16" if precision.name == "fp32" else "fp32"
    times = seconds[other] / seconds[precision.name]
    say(
        f"precision {precision.name}: on this CPU a training product takes {times:.2f} times as "
        f"long in {other}"
    )
    return precision


def faster(seconds):
    """The `Precision` of what was timed: name -> seconds."""
    return Precision("bf16" if seconds["fp32"] >= GAIN * seconds["bf16"] else "fp32", seconds)


def time_product(tokens, size, width, clock=time.perf_counter):
    """Seconds of an MLP's products, forward and backward, in either precision.

    As in training, autocast converts weights and what comes in. Precisions take turns, and of each
    the best round counts: other work on the machine, and the first round's preparations, can only
    add to it.

    Args:
        tokens, size, width: of `product_of`. Larger products are cut to what is as fast.
        clock: tells seconds.

    Returns:
        "fp32" and "bf16" -> seconds.
    """
    tokens, size, width = cut(tokens, size, width)
    # Constants, so that no random number is drawn: the run's own are the same without all this.
    x, up, down = (
        torch.full(shape, 0.01, requires_grad=True)
        for shape in ((tokens, size), (width, size), (size, width))
    )
    best, began = {"fp32": float("inf"), "bf16": float("inf")}, clock()
    for done in range(1, ROUNDS[1] + 1):
        for name in best:
            before = clock()
            _product(x, up, down, name == "bf16")
            best[name] = min(best[name], clock() - before)
        if done >= ROUNDS[0] and clock() - began >= SECONDS:
            break
    return best


def _product(x, up, down, in_bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        y = linear(linear(x, up).relu(), down)
    torch.autograd.grad(y, (x, up, down), torch.ones_like(y))


def cut(tokens, size, width):
    """The same product of at most `FLOPS` operations, tokens first: it is as fast per operation.

    Tokens stay `FEW_TOKENS` or more where there are so many, since each weight is converted once
    for all of them.
    """
    most = FLOPS / 12  # forward and backward, two products, a multiplication and an addition
    tokens = min(tokens, max(FEW_TOKENS, int(most / (size * width))))
    width = min(width, max(size, int(most / (tokens * size))))
    share = min(1.0, (most / (tokens * size * width)) ** 0.5)
    return tokens, max(1, int(size * share)), max(1, int(width * share))
