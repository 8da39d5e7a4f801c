"""A pass of an operator as a straight program: allocations and launches, and nothing decided.

What a pass does hangs on shapes, dtypes and numbers alone: which kernels, with which grids,
constants and configurations. So it is written down while it runs: every call of PyTorch and every
launch becomes a line of Python whose tensors are variables and whose rest is constant. The next
call with the same shapes runs these lines. Kernels are then launched as they were compiled, without
Triton's look at each argument: whether addresses are multiples of 16 bytes, its only open question,
the program asks itself.

What could not be repeated is not written: a value that was read on the host, a tensor that came
from elsewhere. Such a pass runs as it stands, every time.
"""

import functools
import math
import re
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    from triton.compiler import CompiledKernel
except ImportError:
    raise

from .launch_triton import recorders, tape, taping
from .segments_triton import overridden

# Addresses that are multiples of this many bytes Triton knows to be, and compiles for.
ALIGNMENT = 16
# What says something about a tensor, and nothing about its values.
_DESCRIBES = {
    "__get__",
    "__len__",
    "data_ptr",
    "dim",
    "element_size",
    "get_device",
    "is_contiguous",
    "is_floating_point",
    "is_inference",
    "numel",
    "size",
    "stride",
}
_ALLOCATES = {"empty", "empty_like", "new_empty"}
_KNOBS = triton.knobs.runtime


def can_be_direct(compiled):
    """Whether what a launch returned can be launched again without Triton's look at arguments.

    Not by the interpreter, and not on AMD's, where it is compiled in whether a tensor takes less
    than 2 GB. And of Triton's inside everything must be where it is in 3.6 and 3.7.
    """
    hooks = _KNOBS.launch_enter_hook, _KNOBS.launch_exit_hook
    return (
        isinstance(compiled, CompiledKernel)
        and not torch.version.hip
        and all(hasattr(hook, "calls") for hook in hooks)
        and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
    )


class Program:
    """A function of tensors, from its second call on the lines that it comes down to.

    Args:
        function: takes tensors or None; returns tensors or None, in tuples. It may decide by their
            shapes, dtypes and devices, and by which are None: in each call the same.

    Attributes:
        refused: why it could not be written down; None if it was, or was not tried yet.
        source: the lines, once they are written.
    """

    def __init__(self, function):
        self.function = function
        self.refused = self.source = self._lines = None

    def __call__(self, *tensors):
        if self._lines is not None:
            return self._lines(*tensors)
        if self.refused or not _can_be_written(tensors):
            return self.function(*tensors)
        with taping(_Writer(tensors)) as writer, writer:
            results = self.function(*tensors)
        self.refused = writer.refused
        returned = f"return {writer.expression(results)}"
        if writer.refused is None:
            self.source, self._lines = writer.finish(self.function, returned)
        self.refused = writer.refused
        return results


def _can_be_written(tensors):
    given = [x for x in tensors if x is not None]
    # Memory of a captured graph is the graph's, and the first launch loads a kernel.
    capturing = given[0].is_cuda and torch.cuda.is_current_stream_capturing()
    aligned = all(x.data_ptr() % ALIGNMENT == 0 for x in given)
    # Of one tensor in two places the lines would not say which is meant.
    distinct = len({id(x) for x in given}) == len(given)
    return aligned and distinct and not (capturing or recorders or overridden or tape())


class _Writer(TorchFunctionMode):
    """Writes down what PyTorch and Triton are asked for.

    Attributes:
        refused: why what it saw cannot be repeated, or None.
    """

    def __init__(self, inputs):
        super().__init__()
        self.refused = None
        self._is_paused = self._is_direct = False
        self._lines, self._constants = [], {}
        # Tensors by identity: kept alive, so that no other gets the same.
        self._names, self._alive, self._count = {}, list(inputs), len(inputs)
        self._inputs = [f"t{n}" for n in range(len(inputs))]
        self._given = {
            name: x for name, x in zip(self._inputs, inputs, strict=True) if x is not None
        }
        self._names |= {id(x): name for name, x in self._given.items()}
        self._device = next(iter(self._given.values())).device
        self._allocations = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self._is_paused:
            self._write(function, args, kwargs or {}, result)
        return result

    def run_whole(self, function, args):
        """Runs a function whose call becomes a line."""
        with self._pause():
            result = function(*args)
        self._write(function, args, {}, result)
        return result

    def run_constant(self, make, args):
        """Runs a function whose result becomes a constant."""
        with self._pause():
            result = make(*args)
        self._names[id(result)] = self._constant(result)
        return result

    def run_launch(self, kernel, grid, num_warps, num_stages, arguments):
        """Launches a kernel; the line of it launches what was compiled, where that is possible."""
        with self._pause():
            compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
        words = [self.expression(arguments[name]) for name in kernel.arg_names]
        if can_be_direct(compiled):
            self._is_direct = True
            self._constant(compiled)  # alive as long as what it loaded is used
            run = compiled.run
            known = map(self.expression, (compiled.function, compiled.packed_metadata))
            # No metadata of the launch and no hooks: who sets hooks gets the pass as it stands.
            head = [*map(repr, (*grid, 1, 1)[:3]), "stream", *known, "None", "None", "None"]
            words = head + words
        else:
            run = functools.partial(kernel[grid], num_warps=num_warps, num_stages=num_stages)
        self._lines.append(f"{self._constant(run)}({', '.join(words)})")

    def expression(self, x):
        """An argument or a result as it is written."""
        if torch.is_tensor(x):
            if id(x) not in self._names:
                self.refused = self.refused or "a tensor came from elsewhere"
            return self._names.get(id(x), "None")
        if type(x) in (tuple, list):
            text = "".join(f"{self.expression(y)}, " for y in x)
            return f"({text})" if type(x) is tuple else f"[{text}]"
        if x is None or type(x) in (bool, int, str) or (type(x) is float and math.isfinite(x)):
            return repr(x)
        return self._constant(x)

    def finish(self, function, returned):
        """(the program as text, as a function); `function` stands in where it does not hold."""
        arguments = ", ".join(self._inputs)
        addresses = " | ".join(f"{name}.data_ptr()" for name in self._given)
        lines = [
            f"if recorders or overridden or ({addresses}) & {ALIGNMENT - 1}:",
            f"    return function({arguments})",
        ]
        scope = {"function": function, "recorders": recorders, "overridden": overridden}
        scope |= self._constants
        if self._is_direct:
            driver, index = triton.runtime.driver.active, self._device.index or 0
            scope |= {
                "on_device": torch.cuda.device,
                "device": getattr(torch._C, "_cuda_getDevice", driver.get_current_device),
                "current_stream": driver.get_current_stream,
                "knobs": _KNOBS,
                "before": _KNOBS.launch_enter_hook,
                "after": _KNOBS.launch_exit_hook,
            }
            lines += [
                "if knobs.launch_enter_hook is not before or before.calls "
                "or knobs.launch_exit_hook is not after or after.calls:",
                f"    return function({arguments})",
                f"if device() != {index}:",
                f"    with on_device({index}):",
                f"        return program({arguments})",
                f"stream = current_stream({index})",
            ]
        lines += [*self._used(returned), returned]
        source = "\n    ".join([f"def program({arguments}):", *lines]) + "\n"
        exec(compile(source, "<program>", "exec"), scope)
        return source, scope["program"]

    @contextmanager
    def _pause(self):
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _write(self, function, args, kwargs, result):
        name = getattr(function, "__name__", "")
        if not _has_tensors(result):
            is_read = result is not None and name not in _DESCRIBES
            if is_read and _has_tensors([*args, *(kwargs or {}).values()]):
                self.refused = self.refused or f"{name} returned a {type(result).__name__}"
            return
        # Whether it has the dtype already, the dtypes tell. Not so whether it is contiguous.
        if name in ("to", "float") and result is args[0]:
            return
        words = [self.expression(x) for x in args]
        words += [f"{key}={self.expression(x)}" for key, x in kwargs.items()]
        call = f"{self._constant(function)}({', '.join(words)})"
        if name in _ALLOCATES:
            self._allocations.add(len(self._lines))
        self._lines.append(f"{self._targets(result)} = {call}")

    def _used(self, returned):
        """The lines without allocations of nobody's, each tensor forgotten after its last use."""
        last = {}
        for number, line in enumerate([*self._lines, returned]):
            last |= dict.fromkeys(re.findall(r"\bt\d+\b", line), number)
        for number, line in enumerate(self._lines):
            over = [name for name, n in last.items() if n == number]
            if number not in self._allocations or line.split(" = ")[0] not in over:
                yield f"{line}; del {', '.join(over)}" if over else line

    def _targets(self, result):
        if type(result) in (tuple, list):
            return f"({''.join(f'{self._targets(x)}, ' for x in result)})"
        if id(result) not in self._names:
            self._names[id(result)] = f"t{self._count}"
            self._count += 1
            self._alive.append(result)
        return self._names[id(result)]

    def _constant(self, x):
        name = f"c{len(self._constants)}"
        self._constants[name] = x
        return name


def _has_tensors(x):
    return any(map(_has_tensors, x)) if type(x) in (tuple, list) else torch.is_tensor(x)
