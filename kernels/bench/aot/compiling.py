"""One launch of a kernel as one compilation, and what comes out of it."""

import collections
import importlib
import re
import time
from typing import NamedTuple

import torch
import triton
from triton.compiler import ASTSource

from zoo.kernels.bench.aot.devices import DEVICES, occupancy
from zoo.kernels.bench.aot.reading import read_amd, read_loads, read_sass

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Job(NamedTuple):
    """One compilation.

    Attributes:
        kernel: "module:name" of the `triton.jit` function.
        target: one of `TARGETS`.
        signature: (parameter, type) pairs, "constexpr" for the constants.
        constants: (parameter, value) pairs.
        attributes: (position of a parameter, attributes) pairs, as Triton takes them.
        num_warps, num_stages: as Triton means them.
        is_wide: as in `Case`.
    """

    kernel: str
    target: str
    signature: tuple
    constants: tuple
    attributes: tuple
    num_warps: int
    num_stages: int
    is_wide: bool

    @property
    def name(self):
        """The kernel's name after its operator's."""
        module, name = self.kernel.split(":")
        return f"{module.split('.')[-1].removesuffix('_triton')}.{name}"

    @property
    def configuration(self):
        """Dtypes, numbers and switches in words: what tells two jobs of a kernel apart."""
        pointers = collections.Counter(t[1:] for _, t in self.signature if t.startswith("*"))
        words = ["+".join(sorted(pointers))]
        for name, value in self.constants:
            if value is None or value is False or not name.isupper():
                continue
            words.append(name if value is True else f"{name}={value}")
        return f"{' '.join(words)} warps={self.num_warps} stages={self.num_stages}"

    @property
    def key(self):
        """Its row in resources.json."""
        return f"{self.target} {self.name} {self.configuration}"


def specialise(launch, target, is_wide):
    """The compilation that Triton would start for a launch.

    As it does, integers that are 1 become constants, and those divisible by 16 are known to be, as
    are addresses; for AMD also whether a tensor is under 2 GB.
    """
    signature, constants, attributes = [], [], []
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        aligned = [["tt.divisibility", 16]]
        kind, attribute = "constexpr", None
        if torch.is_tensor(value):
            kind = POINTERS[value.dtype]
            attribute = aligned if value.data_ptr() % 16 == 0 else []
            is_small = value.untyped_storage().nbytes() < 2**31
            if target == "gfx942" and is_small:
                attribute = [*attribute, ["tt.pointer_range", 32]]
        elif parameter.is_constexpr or value is None:
            pass
        elif isinstance(value, bool):
            kind = parameter.annotation_type or "u1"
        elif isinstance(value, float):
            kind = parameter.annotation_type or "fp32"
        elif isinstance(value, int):
            if value != 1 or parameter.do_not_specialize:
                fits = -(2**31) <= value < 2**31
                kind = parameter.annotation_type or ("i32" if fits else "i64")
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attribute = aligned
        else:
            raise ValueError(
                f"{launch.name}: {name} is a tensor, a number, None or a constant (tl.constexpr), "
                f"got {type(value).__name__}; declare the parameter as tl.constexpr."
            )
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        if attribute:
            attributes.append((position, tuple(map(tuple, attribute))))
    function = launch.kernel.fn
    return Job(
        f"{function.__module__}:{function.__name__}",
        target,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        launch.num_warps,
        launch.num_stages,
        is_wide,
    )


def compile_job(job):
    """Compiles one job and reads the result: a dict of figures, or of "error" alone."""
    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs={(kernel.arg_names.index(key),): value for key, value in job.constants},
        attrs={(position,): [list(x) for x in a] for position, a in job.attributes},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=DEVICES[job.target].target, options=options)
    except Exception as error:  # whatever a compiler throws is a finding of this tool
        first = next(iter(str(error).strip().splitlines()), "")
        return {"error": f"{type(error).__name__}: {first[:200]}"}
    figures = {
        "shared": compiled.metadata.shared,
        "bfloat16_dots": len(re.findall(r"tt\.dot .*: tensor<[\dx]+xbf16>", compiled.asm["ttir"])),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if job.target == "gfx942":
        figures |= read_amd(compiled.asm["amdgcn"])
    else:
        figures |= read_sass(compiled.asm["cubin"])
        figures |= read_loads(compiled.asm["ttgir"], 32 * job.num_warps)
    figures["programs"] = occupancy(job.target, figures, job.num_warps)
    return figures
