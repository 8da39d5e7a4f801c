"""Contenders compared with float64 before they are timed."""

import torch

from zoo.kernels.bench.gpu.workloads import OTHER_FUNCTIONS

# Largest accepted ||x - reference|| / ||reference||, for values and gradients. Products of bfloat16
# are off by 2e-3 to 8e-3; gradients of decays are small differences of large sums.
LIMIT, DECAY_LIMIT = 2e-2, 5e-2


def calls(workload, mode):
    """Functions without arguments, by contender: one call of the mode."""
    inputs = workload.inputs
    if mode != "training":

        def no_gradients(function):
            def call():
                with torch.no_grad():
                    return function(**inputs)

            return call

        return {name: no_gradients(function) for name, function in workload.contenders.items()}

    leaves = leaves_of(workload, inputs)
    cotangent = None

    def training(function):
        def call():
            nonlocal cotangent
            o = function(**(inputs | leaves))
            if cotangent is None:
                cotangent = cotangent_like(o)
            return torch.autograd.grad(o, list(leaves.values()), cotangent)

        return call

    return {name: training(function) for name, function in workload.contenders.items()}


def leaves_of(workload, inputs):
    """What training needs gradients of, detached from everything else."""
    return {name: inputs[name].detach().requires_grad_() for name in workload.learned}


def cotangent_like(o):
    if o.is_meta:
        return torch.empty_like(o)
    generator = torch.Generator(o.device).manual_seed(1)
    return torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype)


def relative(x, reference):
    """||x - reference|| / ||reference||."""
    return ((x.double() - reference).norm() / reference.norm()).item()


def errors(workload, mode, function):
    """Relative errors against float64 by name, on a few heads of all: they know nothing of others.

    The state that decoding replaces is a copy.
    """
    few = workload.few
    inputs = {name: x.clone() for name, x in workload.inputs.items()}
    exact = {name: few(name, x).double() for name, x in workload.inputs.items()}
    if mode != "training":
        with torch.no_grad():
            return {"o": relative(few("o", function(**inputs)), workload.reference(**exact))}
    leaves, exact_leaves = leaves_of(workload, inputs), leaves_of(workload, exact)
    o, expected = function(**(inputs | leaves)), workload.reference(**(exact | exact_leaves))
    cotangent = cotangent_like(o)
    gradients = torch.autograd.grad(o, list(leaves.values()), cotangent)
    expected_gradients = torch.autograd.grad(
        expected, list(exact_leaves.values()), few("o", cotangent).double()
    )
    found = {"o": relative(few("o", o.detach()), expected.detach())}
    for name, gradient, exact_gradient in zip(leaves, gradients, expected_gradients, strict=True):
        found[f"d{name}"] = relative(few(name, gradient), exact_gradient)
    return found


def is_right(found):
    """Whether all errors are small; one that is not a number is not."""
    return all(
        error <= (DECAY_LIMIT if name in ("dlog_decay", "dw") else LIMIT)
        for name, error in found.items()
    )


def first_line(error):
    """An exception in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class DeviceLost(RuntimeError):
    """After some errors, such as an illegal access, a process can do nothing more on its device."""


def check_and_warm_up(device, workload, mode):
    """(functions that may be timed, what is known of every contender), both by name.

    What fails or computes something else is not timed; `known` says why.

    Raises:
        DeviceLost: a contender failed in a way that no other could be run after it.
    """
    functions, known = {}, {}
    for name, call in calls(workload, mode).items():
        known[name] = {}
        try:
            if name not in OTHER_FUNCTIONS:
                found = errors(workload, mode, workload.contenders[name])
                known[name]["errors"] = {key: float(f"{e:.2g}") for key, e in found.items()}
                if not is_right(found):
                    known[name]["failed"] = "wrong results"
                    continue
            for _ in range(3):
                call()
        except Exception as error:  # any failure of theirs or ours is a result, not the end
            known[name]["failed"] = first_line(error)
            try:
                device.synchronize()
            except Exception as lost:
                raise DeviceLost(f"{name}, {mode}: {first_line(error)}") from lost
            continue
        functions[name] = call
    return functions, known
