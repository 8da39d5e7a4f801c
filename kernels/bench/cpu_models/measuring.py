"""One case: a task at a size, its contenders in turns, and their shares of the ceilings."""

import statistics

import torch

from zoo.core import onednn

from .contenders import MISTRAL, Contender
from .peers import TWINS, peer
from .tasks import (
    LENGTH,
    PROMPT,
    figures,
    generation,
    in_turns,
    matrix_product,
    matrix_vector,
    onednn_product,
    prefill,
    step,
    training,
)

FOR_PEERS = ("prefill", "step 1")  # what other people's programs are asked
LIMIT = 10.0  # seconds of a contender in a case, after which it sits the remaining rounds out


class Group:
    """The contenders of a group at a size, built when first asked for."""

    def __init__(self, size, names):
        self.size, self.names, self.dtype = size, names, torch.float32
        self.built, self.broken = {}, {}

    def contenders(self, dtype, task):
        """name -> contender of a task, in that dtype; who cannot be is in `broken`."""
        if not self.built:
            for name in self.names:
                if name not in self.others():
                    self.built[name] = Contender(name, self.size)
        if dtype != self.dtype:
            for name, x in self.built.items():
                if name not in self.others():
                    x.to(dtype)
            self.built = {k: x for k, x in self.built.items() if k not in self.others()}
            self.dtype = dtype
        for name in self.others() if task in FOR_PEERS else ():
            if name not in self.built and name not in self.broken:
                try:
                    twin = self.built.get(TWINS.get(name))
                    self.built[name] = peer(name, self.size, twin)
                    self.built[name].to(dtype)
                except Exception as error:
                    self.built.pop(name, None)
                    self.broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return self.built

    def others(self):
        """Names of what is not a PyTorch module of ours or of transformers'."""
        return [x for x in self.names if x in TWINS]


def turns_of(task, contenders, dtype):
    """({name: turn}, {name: the same to warm up}) of who can do a task."""
    turns, warm_ups = {}, {}
    for name, x in contenders.items():
        try:
            pair = _turns(task, x, dtype)
        except Exception as error:
            pair = 2 * (_raising(error),)
        if pair:
            turns[name], warm_ups[name] = pair
    return turns, warm_ups


def _turns(task, x, dtype):
    """(turn, the same to warm up) of a contender, or None if it cannot do this."""
    kind, _, rows = task.partition(" ")
    short = LENGTH if x.is_compiled else 64  # another length would compile another program
    if kind == "training":
        autocast = None if dtype == torch.float32 else dtype
        return (training(x, autocast), training(x, autocast, short)) if x.can_train else None
    if kind == "prefill":
        return prefill(x), prefill(x, short)
    if kind == "step" and (x.has_batches or rows == "1"):
        return 2 * (step(x, int(rows)),)
    return 2 * (generation(x, int(rows)),) if kind == "generate" and x.can_generate else None


def _raising(error):
    def turn():
        raise error

    return turn


def ceilings(task, dtype):
    """({name: turn}, {name: operations or bytes of a turn}): what the machine can do."""
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if task in ("prefill", "training"):
        turn, amount = matrix_product(dtype)
        name = f"product {names[dtype]}"
        turns, amounts = {name: turn}, {name: amount}
        if dtype == torch.float32 and onednn.is_faster_here():
            name = "product float32 by oneDNN"
            turns[name], amounts[name] = onednn_product()
        return turns, amounts
    made = {f"vector {names[x]}": matrix_vector(x) for x in names}
    return {k: turn for k, (turn, _) in made.items()}, {k: n for k, (_, n) in made.items()}


def measure(task, contenders, dtype, rounds, limit=LIMIT):
    """A case: {"ceilings": ..., "by": {contender: figures}}."""
    own, amounts = ceilings(task, dtype)
    inference = torch.inference_mode(task != "training")
    with inference:
        turns, warm_ups = turns_of(task, contenders, dtype)
        in_turns(own | warm_ups, 1, limit)
        samples = in_turns(own | turns, rounds, limit)
    rates = {name: n / statistics.median(samples.pop(name)) for name, n in amounts.items()}
    by = {}
    for name, seconds in samples.items():
        x = contenders[name]
        if isinstance(seconds, str):
            by[name] = {"failed": seconds}
            continue
        reference = samples.get(MISTRAL, [])
        by[name] = figures(seconds, [] if isinstance(reference, str) else reference)
        by[name] |= share(task, x, by[name]["seconds"], max(rates.values()), turns[name])
    return {"ceilings": rates, "by": by}


def share(task, contender, seconds, rate, turn):
    """Of the ceiling: {"floor": seconds at that rate, "share": of the time taken}, if known."""
    if task in ("prefill", "training"):
        amount = contender.flops(LENGTH, task == "training")
    elif task.startswith("step"):
        rows = int(task.split()[1])
        amount = contender.decode_bytes(PROMPT, rows, turn.cache())
    else:
        amount = None
    if amount is None:
        return {}
    return {"floor": amount / rate, "share": amount / rate / seconds}
