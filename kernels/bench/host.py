"""What the host does for a call of an operator, measured without a GPU: all of it but the launch.

    python kernels/bench/host.py            measure, and write results/host.json
    python kernels/bench/host.py --table    the table of it in README.md, from that file

Tensors lie on the CPU and are small, for which the operators take their road to the kernels as for
tensors on a GPU: checks, configurations, allocations, autograd. Of Triton everything runs but the
compiler and the launcher of a kernel, which counts its calls here. So times are those of a host
alone, one thread of it in CPU time; the driver's part of a launch comes on top.

The floor is a function of autograd with as many tensors, which allocates as many results and saves
its inputs, forward and backward, and does nothing else.
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel

from zoo.kernels import (
    delta_recurrence,
    dilated_attention,
    known_calls,
    linear_recurrence,
    token_mix,
    wkv4,
)
from zoo.kernels.bench.marked import replaced

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "host.json"
README = HERE / "README.md"


class _Launcher:
    """Stands in for what puts a kernel on a device: counts."""

    count = 0

    def __call__(self, *_):
        _Launcher.count += 1


class Compiled(CompiledKernel):
    """What Triton makes of a kernel, without the code of it."""

    def __init__(self):
        self.src = self.name = self.hash = None
        self.module, self.function, self.packed_metadata = "", 0, ()
        self._run = _Launcher()


class _Driver:
    """Of a machine with one H100."""

    def __init__(self):
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def without_a_gpu():
    """Operators take tensors on the CPU for those of a GPU, whose kernels do nothing."""
    compiled = {}

    def run(kernel, *args, grid, warmup, **arguments):
        """Of the interpreter, which then stands for the compiler."""
        kernel = compiled.setdefault(kernel, Compiled())
        kernel.run(*grid, *args)
        return kernel

    with contextlib.ExitStack() as stack:

        def replace(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        for module in (linear_recurrence, delta_recurrence, wkv4, dilated_attention, token_mix):
            replace(module, "choose_backend", lambda *_: "triton")
            replace(module, "_known", known_calls.KnownCalls())
        replace(known_calls, "KIND", "cpu")
        replace(triton.runtime.driver, "_active", _Driver())
        if triton.knobs.runtime.interpret:
            replace(triton.runtime.interpreter.InterpretedFunction, "run", run)
        else:
            replace(triton.compiler, "compile", lambda *_, **__: Compiled())
        yield


class Case:
    """A call of an operator.

    Attributes:
        call: makes it, and returns its output.
        leaves: what gradients are taken of; none of a decoding step.
    """

    def __init__(self, call, leaves=()):
        self.call, self.leaves = call, [x.requires_grad_() for x in leaves]
        with torch.no_grad():
            self.gradient = torch.empty_like(call())

    def training(self):
        return torch.autograd.grad(self.call(), self.leaves, self.gradient)

    @property
    def modes(self):
        """{name: what to run} of what is measured."""
        if not self.leaves:
            return {"forward": self.call}
        return {"forward": self.call, "training": self.training}


def cases():
    """{name: `Case`}; sizes matter where they decide what is launched."""
    made = {}

    def tensor(*shape, dtype=torch.bfloat16):
        return -torch.rand(shape).to(dtype)

    def linear(name, form, bonus=False, state=False, time=64, learned=True):
        q, k, v = (tensor(1, time, 2, 16) for _ in range(3))
        shape = {"H": (2,), "BTH": (1, time, 2), "BTHK": (1, time, 2, 16)}[form]
        decay = tensor(*shape, dtype=torch.float32)
        keyword = {"bonus": tensor(2, 16, dtype=torch.float32) if bonus else None}
        if state:
            keyword |= {"initial_state": tensor(1, 2, 16, 16, dtype=torch.float32)}
            keyword |= {"output_final_state": True}
        leaves = [q, k, v, *([decay] if form != "H" else []), *([keyword["bonus"]] * bonus)]
        call = linear_recurrence.linear_recurrence
        made[name] = Case(lambda: call(q, k, v, decay, **keyword)[0], leaves if learned else ())

    def delta(name, width=16, time=64, state=False):
        q, k, v, a, b = (tensor(1, time, 2, width) for _ in range(5))
        decay = tensor(1, time, 2, width, dtype=torch.float32)
        keyword = {}
        if state:
            keyword["initial_state"] = tensor(1, 2, width, width, dtype=torch.float32)
            keyword["output_final_state"] = True
        call = delta_recurrence.delta_recurrence
        leaves = () if state else (q, k, v, decay, a, b)
        made[name] = Case(lambda: call(q, k, v, decay, a, b, **keyword)[0], leaves)

    def rwkv4(name, time=64, state=False):
        w, u = (tensor(16, dtype=torch.float32) for _ in range(2))
        k, v = (tensor(1, time, 16) for _ in range(2))
        keyword = {}
        if state:
            keyword["initial_state"] = tensor(1, 3, 16, dtype=torch.float32)
            keyword["output_final_state"] = True
        leaves = () if state else (w, u, k, v)
        made[name] = Case(lambda: wkv4.wkv4(w, u, k, v, **keyword)[0], leaves)

    def longnet(name):
        q, k, v = (tensor(1, 64, 2, 16) for _ in range(3))
        call, branches = dilated_attention.dilated_attention, ((16, 32, 64), (1, 2, 4))
        made[name] = Case(lambda: call(q, k, v, *branches), (q, k, v))

    def mix(name, streams, corrections=False):
        x, mu = tensor(1, 64, 16), tensor(streams, 16)
        asked = [tensor(1, 64, 16) for _ in range(streams)] if corrections else []
        call = token_mix.token_mix
        leaves = (x, mu, *asked)
        made[name] = Case(lambda: torch.stack(call(x, mu, corrections=asked)), leaves)

    linear("scan, a decay per head", "H")
    linear("scan, a decay per token", "BTH")
    linear("scan, a decay per channel, bonus", "BTHK", bonus=True)
    linear("scan, a decay per head, segments", "H", time=4096)
    delta("delta rule")
    delta("delta rule, walk", width=144)
    rwkv4("wkv4")
    mix("token mix, 6 streams", 6)
    mix("token mix, 5 streams, corrections", 5, corrections=True)
    longnet("dilated attention, 3 branches")
    linear("step of the scan, a decay per head", "H", state=True, time=1, learned=False)
    steps = "step of the scan, a decay per channel, bonus"
    linear(steps, "BTHK", bonus=True, state=True, time=1, learned=False)
    delta("step of the delta rule", time=1, state=True)
    rwkv4("step of wkv4", time=1, state=True)
    return made


class _Floor(torch.autograd.Function):
    """What any operator of three tensors costs."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx, _):
        q, k, v = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def floor():
    """A `Case` of `_Floor`."""
    q, k, v = (torch.rand(1, 64, 2, 16).bfloat16() for _ in range(3))
    return Case(lambda: _Floor.apply(q, k, v), (q, k, v))


def calls_of(run):
    """{"launches": of kernels, "calls": of Python functions} of one run of a function."""
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        calls += event == "call"

    before = _Launcher.count
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {"launches": _Launcher.count - before, "calls": calls}


def every_mode(todo):
    """(name, mode, what to run) of cases; where gradients are off in "forward"."""
    for name, case in todo.items():
        for mode, run in case.modes.items():
            with torch.set_grad_enabled(mode == "training"):
                yield name, mode, run


def measure(rounds, repeats):
    """{case: {mode: {"us", "launches", "calls"}}}, all cases in turns."""
    with without_a_gpu():
        todo = {"floor": floor(), **cases()}
        for _ in range(4):  # until calls like these are known, and their passes written down
            for *_, run in every_mode(todo):
                run()
        samples, found = {}, {}
        for name, mode, run in every_mode(todo):
            found.setdefault(name, {})[mode] = calls_of(run)
        for _ in range(rounds):
            for name, mode, run in every_mode(todo):
                start = time.process_time()
                for _ in range(repeats):
                    run()
                spent = (time.process_time() - start) / repeats
                samples.setdefault((name, mode), []).append(1e6 * spent)
    for (name, mode), times in samples.items():
        found[name][mode]["us"] = round(statistics.median(times), 1)
    return found


def table(found):
    """Lines of a table for people."""
    lines = [
        "| one call, the launch itself left out | forward us | forward and backward us "
        "| launches | calls of Python functions |",
        "|---|---|---|---|---|",
    ]
    for name, modes in found.items():
        us, launches, calls = (
            [str(mode[what]) for mode in modes.values()] for what in ("us", "launches", "calls")
        )
        training = us[1] if len(us) > 1 else ""
        lines.append(
            f"| {name} | {us[0]} | {training} | {', '.join(launches)} | {', '.join(calls)} |"
        )
    return lines


def main():
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write README.md from the results")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        found = measure(options.rounds, options.repeats)
        print("\n".join(table(found)))
        record = {
            "host": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cases": found,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        return
    record = json.loads(RESULTS.read_text())
    versions = ", ".join(f"{key} {record[key]}" for key in ("python", "torch", "triton"))
    lines = [f"One thread, {record['host']} ({versions}).", "", *table(record["cases"]), ""]
    README.write_text(replaced(README.read_text(), "host", lines))


if __name__ == "__main__":
    main()
