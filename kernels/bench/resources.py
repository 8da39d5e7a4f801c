"""Compiles what the operators launch, for four targets and without a GPU, and checks what came out.

    make aot                                        check, and print a table
    python kernels/bench/resources.py --update      the same, and rewrite resources.json
    python kernels/bench/resources.py --only RWKV   cases whose name contains RWKV

The operators run on tensors without memory under `recording`, so the kernels, their arguments and
their configurations are those of real calls. Each is compiled ahead of time; registers, shared
memory and instructions are read from the machine code. What must hold:

    compile       it compiles
    spill         no register goes to memory
    shared        shared memory fits
    tensor core   products of bfloat16 are done by tensor cores, on sm_90 by wgmma (HGMMA) alone
    operands      sm_90: a wgmma's operands lie where its descriptors say (sass.py: a bug of the
                  assembler)
    loads         sm_90, heads a multiple of 64: what a loop loads comes asynchronously and 128
                  bits at a time
    occupancy     no fewer programs to a multiprocessor than resources.json says
    head size     each kernel has a configuration for each target and head size that fits
    launches      no more launches in a call than resources.json says
    bytes         memory traffic per token and head at most the case's limit

Triton must not interpret: TRITON_INTERPRET must not be set.
"""

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoo.kernels import (
    delta_recurrence_triton,
    dilated_attention_triton,
    linear_recurrence_channels_triton,
    linear_recurrence_triton,
    wkv4_triton,
)
from zoo.kernels.bench import sass
from zoo.kernels.launch_triton import TARGETS, recording

HERE = Path(__file__).resolve().parent
TABLE = HERE / "resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

KILO = 1024


class Device(NamedTuple):
    """What a multiprocessor (on AMD: compute unit) has, and what one program may have of it.

    Attributes:
        target: as Triton names it.
        shared_limit: bytes of shared memory that a program may take.
        shared: bytes of shared memory there are; a program occupies `shared_reserved` more than it
            asks for.
        warps: resident at once.
    """

    target: GPUTarget
    shared_limit: int
    shared: int
    shared_reserved: int
    warps: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 * KILO, 164 * KILO, KILO, 64),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 * KILO, 228 * KILO, KILO, 64),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 * KILO, 228 * KILO, KILO, 64),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 * KILO, 64 * KILO, 0, 32),
}

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Allowed(NamedTuple):
    """A complaint that is accepted, with the reason. One that no longer occurs is a complaint.

    Attributes:
        check: its name, as in the module's docstring.
        kernel, target: of the complaint; target "" for all.
        where: a string that the kernel's configuration or the case's name contains.
        reason: why this is right, for the reader of the table.
    """

    check: str
    kernel: str
    target: str
    where: str
    reason: str


ALLOWED = [
    *(
        Allowed(
            "tensor core",
            f"delta_recurrence.{kernel}",
            "sm_90",
            "",
            "The triangular system of a chunk is inverted in it, so chunks are short, and wgmma "
            "takes 64 rows.",
        )
        for kernel in ("_prepare", "_scan_outputs", "_gradients")
    ),
    Allowed(
        "spill",
        "linear_recurrence._step",
        "sm_90",
        "DECAY=1",
        "One word, outside any loop, at 56 registers: the assembler makes room for 9 programs.",
    ),
    Allowed(
        "spill",
        "linear_recurrence._scan",
        "",
        "COMPUTE=fp32",
        "A product of float32 is three of tf32, with both parts of its factors in registers. For "
        "float32 inputs, and for gradients of scalar gates, which no architecture here trains.",
    ),
    Allowed(
        "spill",
        "linear_recurrence._scan",
        "sm_100",
        "A=512",
        "A dozen words: the smallest tile of a state of 512 rows fills the registers.",
    ),
    Allowed(
        "spill",
        "linear_recurrence._scan",
        "sm_80",
        "DECAY=0",
        "Nine words; the same tile with a decay does not spill.",
    ),
    Allowed(
        "spill",
        "linear_recurrence._scan",
        "sm_90",
        "A=512",
        "A dozen words: the smallest tile of a state of 512 rows fills the registers.",
    ),
    Allowed(
        "tensor core",
        "linear_recurrence._scan",
        "sm_90",
        "A=512",
        "Chunks of 32, which wgmma does not take: with chunks of 64 the assembler miscompiles all "
        "tiles that fit (sass.py).",
    ),
    Allowed(
        "loads",
        "linear_recurrence_channels._scan",
        "sm_90",
        "REVERSE TRANSPOSED",
        "The state at the chunk's end goes into a row sum, not into a product.",
    ),
    Allowed(
        "loads",
        "linear_recurrence_channels._within",
        "sm_90",
        "K=128",
        "Two turns over halves of the channels: there is no walk to run ahead of.",
    ),
    Allowed(
        "loads",
        "delta_recurrence._gradients",
        "sm_90",
        "",
        "One stage: its gradients take all registers.",
    ),
    *(
        Allowed("spill", f"delta_recurrence.{kernel}", target, "", "A word or a few, not tiles.")
        for kernel, target in (
            ("_scan_states", "sm_80"),
            ("_gradients", ""),
            ("_prepare", "gfx942"),
        )
    ),
    *(
        Allowed(
            check,
            f"dilated_attention.{kernel}",
            "sm_90",
            "K=256",
            "Heads of 256, which no LongNet has: tiles of 64 rows, which wgmma takes, spill.",
        )
        for check in ("tensor core", "loads")
        for kernel in ("_forward", "_queries", "_keys")
    ),
    Allowed(
        "spill",
        "dilated_attention._forward",
        "sm_80",
        "COMPUTE=fp32",
        "A product of float32 is three of tf32, with both parts of its factors in registers.",
    ),
    Allowed(
        "spill",
        "delta_recurrence_walk._walk_readers",
        "sm_80",
        "fp32 H=8 K=512",
        "Two words at 128 registers: the assembler makes room for 4 programs.",
    ),
]


class Case(NamedTuple):
    """A public call to check.

    Attributes:
        run: performs it, forward and backward, on tensors of the "meta" device.
        token_heads: B T H, what bytes are divided by.
        is_wide: whether heads are multiples of 64 and inputs bfloat16: loads are checked.
        max_bytes: the most bytes of memory traffic per token and head; None: only reported.
        must_fit: whether each kernel needs a configuration that fits. Wide heads in float32 have
            none on NVIDIA: a product of float32 is three of tf32, with both parts in registers.
    """

    run: Callable[[], None]
    token_heads: int
    is_wide: bool
    max_bytes: int | None = None
    must_fit: bool = True


def empty(*shape, dtype=torch.bfloat16):
    """A tensor that has no memory, only a shape."""
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(
    form, batch, time, heads, key_dim, value_dim=None, bonus=False, dtype=torch.bfloat16, **limits
):
    """`linear_recurrence` with a decay of one form: "none", "H", "BTH" or "BTHK".

    The gradients asked for are those of training: of q, k, v, bonus and all decays but [H].
    """
    value_dim = value_dim or key_dim
    operator = linear_recurrence_triton if form != "BTHK" else linear_recurrence_channels_triton

    def run():
        q, k, do = (
            empty(batch, time, heads, d, dtype=dtype) for d in (key_dim, key_dim, value_dim)
        )
        v = torch.empty_like(do)
        decay = gates(form, q)
        u = empty(heads, key_dim, dtype=torch.float32) if bonus else None
        inputs = q, k, v, decay, u, None, None
        _, _, entering = operator.forward(*inputs, 1.0, False)
        operator.backward(*inputs, entering, do, None, 1.0, form in ("BTH", "BTHK"), False)

    is_wide = dtype == torch.bfloat16 and key_dim % 64 == value_dim % 64 == 0
    return Case(run, batch * time * heads, is_wide, **limits)


def gates(form, q):
    """Log decays of a form for queries [B, T, H, K], in float32."""
    if form == "none":
        return None
    shape = q.shape[2:3] if form == "H" else q.shape[: len(form)]
    return empty(*shape, dtype=torch.float32)


def delta(batch, time, heads, key_dim, value_dim=None, form="BTHK", dtype=torch.bfloat16):
    """`delta_recurrence` as RWKV-7 trains it, or with a decay of another form."""
    value_dim = value_dim or key_dim

    def run():
        q, k, a, b = (empty(batch, time, heads, key_dim, dtype=dtype) for _ in range(4))
        v, do = (empty(batch, time, heads, value_dim, dtype=dtype) for _ in range(2))
        decay = gates(form, q)
        inputs = q, k, v, decay, a, b, None, None
        delta_recurrence_triton.forward(*inputs, 1.0, False)
        delta_recurrence_triton.backward(*inputs, do, None, 1.0, decay is not None, False)

    is_wide = dtype == torch.bfloat16 and key_dim % 64 == value_dim % 64 == 0
    return Case(run, batch * time * heads, is_wide)


def rwkv4(batch, time, width):
    """`wkv4`; bytes are per token and channel."""

    def run():
        k, v, dy = (empty(batch, time, width) for _ in range(3))
        w, u = (empty(width, dtype=torch.float32) for _ in range(2))
        inputs = w, u, k, v, None, None
        _, final, entering = wkv4_triton.forward(*inputs)
        wkv4_triton.backward(*inputs, final, entering, dy, None)

    return Case(run, batch * time * width, False)


def dilated(batch, time, heads, width, decay=False, packed=False, dtype=torch.bfloat16, **limits):
    """`dilated_attention` with LongNet's five branches, of the first two where documents go on."""
    lengths, rates = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]
    lengths, rates = (x[: 2 if packed else 5] for x in (lengths, rates))

    def run():
        q, k, v, do = (empty(batch, time, heads, width, dtype=dtype) for _ in range(4))
        log_decay = empty(width, dtype=torch.float32) if decay else None
        held = [None] * 4
        if packed:
            slots = sum(-(-w // r) for w, r in zip(lengths, rates))
            held[:2] = (empty(8, heads, slots, width, dtype=dtype) for _ in range(2))
            held[2] = empty(8, dtype=torch.int64)
        bounds = empty(9, dtype=torch.int64) if packed else None
        inputs = q, k, v, *held, log_decay, bounds
        numbers = lengths, rates, width**-0.5, False, not packed
        results = dilated_attention_triton.forward(*inputs, *numbers)
        dilated_attention_triton.backward(*inputs, *results, do, *numbers)

    is_wide = width % 64 == 0 and dtype == torch.bfloat16
    return Case(run, batch * time * heads, is_wide, **limits)


def steps(batch, heads, width):
    """One token of each operator, for decoding."""

    def run():
        q, k, v, a, b = (empty(batch, 1, heads, width) for _ in range(5))
        state = empty(batch, heads, width, width, dtype=torch.float32)
        u = empty(heads, width, dtype=torch.float32)
        keyword = {"state": state, "in_place": True}
        linear_recurrence_triton.linear_recurrence_step(q, k, v, gates("H", q), **keyword)
        linear_recurrence_triton.linear_recurrence_step(
            q, k, v, gates("BTHK", q), bonus=u, **keyword
        )
        delta_recurrence_triton.delta_recurrence_step(q, k, v, gates("BTHK", q), a, b, **keyword)
        wkv4_triton.wkv4_step(
            u[0], u[0], q[:, :, 0], v[:, :, 0], state=state[:, 0, :3].contiguous(), in_place=True
        )

    return Case(run, batch * heads, False)


CASES: dict[str, Case] = {
    "retention 64": linear("H", 8, 8192, 16, 64),
    "retention 128": linear("H", 8, 8192, 16, 128, max_bytes=4100),
    "retention 128, segments": linear("H", 1, 65536, 16, 128, max_bytes=5300),
    "retention 256": linear("H", 8, 2048, 32, 256),
    "retention 256, 512": linear("H", 8, 2048, 8, 256, 512),
    "linear attention 128": linear("none", 8, 8192, 16, 128),
    "scalar gates 64": linear("BTH", 8, 8192, 32, 64),
    "scalar gates 128": linear("BTH", 8, 8192, 16, 128),
    "scalar gates 60": linear("BTH", 8, 8192, 32, 60),
    "scalar gates 64, float16": linear("BTH", 8, 8192, 32, 64, dtype=torch.float16),
    "scalar gates 256": linear("BTH", 8, 2048, 16, 256),
    "retention with bonus 64": linear("H", 8, 4096, 32, 64, bonus=True),
    "retention 64, float32": linear("H", 8, 8192, 32, 64, dtype=torch.float32),
    "retention 128, float32": linear("H", 8, 8192, 16, 128, dtype=torch.float32, must_fit=False),
    "RWKV-6 64": linear("BTHK", 8, 4096, 32, 64, bonus=True),
    "GLA 128": linear("BTHK", 8, 4096, 16, 128),
    "GLA 128, segments": linear("BTHK", 1, 65536, 4, 128),
    "RWKV-7 64": delta(8, 4096, 32, 64),
    "delta 128": delta(8, 4096, 16, 128),
    "delta 256": delta(4, 2048, 8, 256),
    "delta 200, 60, float32": delta(4, 2048, 8, 200, 60, "BTH", torch.float32),
    "delta 512": delta(4, 2048, 8, 512),
    "delta 512, no decay": delta(4, 2048, 8, 512, form="none"),
    "delta 512, float32": delta(4, 2048, 8, 512, dtype=torch.float32),
    "wkv4": rwkv4(8, 4096, 2048),
    "LongNet 64, xPos": dilated(4, 32768, 12, 64, decay=True),
    "LongNet 64, packed, from a state": dilated(1, 65536, 12, 64, packed=True),
    "LongNet 48": dilated(4, 32768, 16, 48),
    "LongNet 128, xPos": dilated(4, 32768, 12, 128, decay=True),
    "LongNet 256, xPos": dilated(2, 32768, 4, 256, decay=True),
    "LongNet 64, xPos, float32": dilated(
        4, 32768, 12, 64, decay=True, dtype=torch.float32, must_fit=False
    ),
    "steps": steps(64, 16, 128),
    "steps 512": steps(64, 8, 512),
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


def read_amd(assembly):
    """Registers, scratch memory and matrix instructions from the assembler's notes."""

    def number(field):
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1))

    return {
        "registers": number("vgpr_count"),  # the accumulation registers are counted in
        "stack": number("private_segment_fixed_size"),
        "spilled": number("vgpr_spill_count"),
        "tensor_core": len(re.findall(r"v_mfma", assembly)),
    }


def read_sass(cubin):
    """Registers, stack and counts of instructions from NVIDIA machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag):
            command = [CUOBJDUMP, flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK):(\d+)", dump("--dump-resource-usage")))
        code = sass.instructions(dump("-sass"))
    operations = [instruction.operation for instruction in code]
    count = collections.Counter(operation.split(".")[0] for operation in operations)
    wide = sum(bool(re.match(r"LDGSTS\b.*\.128\b", operation)) for operation in operations)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "spilled": count["LDL"] + count["STL"],
        "HGMMA": count["HGMMA"],
        "HMMA": count["HMMA"],
        # sm_100's are named UTCHMMA, UTCQMMA and so on.
        "tensor_core": sum(n for name, n in count.items() if name.endswith("MMA")),
        "stray": len(sass.stray_descriptors(code)),
        "wide_copies": wide,
        "instructions": len(operations) - count["NOP"],
    }


def read_loads(ttgir, num_threads):
    """How two-dimensional tiles are loaded, from Triton's code for one target.

    Returns:
        "waits": loads inside a loop that it waits for. "copies": the 128-bit instructions that all
        asynchronous copies take if none is narrower. Vectors (gates) do not count.
    """
    waits, copies, depth, loops = 0, 0, 0, []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        if loops and depth <= loops[-1]:
            loops.pop()
        tile = re.search(r"tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>", line)
        if tile and "async_copy_global_to_local" in line:
            rows, columns, bits = map(int, tile.groups())
            # Of a tile smaller than that every thread copies less, in one instruction anyway.
            copies += rows * columns * bits // (128 * num_threads)
        elif tile and loops and "= tt.load " in line:
            waits += 1
    return {"waits": waits, "copies": copies}


def occupancy(target, figures, num_warps):
    """Programs that share a multiprocessor at once."""
    device = DEVICES[target]
    if target == "gfx942":
        # Each of four units has 512 registers a lane, handed out in eights, and room for 8 waves.
        registers = max(8, -(-figures["registers"] // 8) * 8)
        by_registers = 4 * min(8, 512 // registers) // num_warps
    else:
        # 65,536 registers, handed out to a warp in units of 256.
        by_registers = 65536 // (-(-figures["registers"] * 32 // 256) * 256) // num_warps
    limits = [by_registers, device.warps // num_warps, 32]
    if figures["shared"]:
        limits.append(device.shared // (figures["shared"] + device.shared_reserved))
    return min(limits)


REMEDIES = {
    "compile": "the interpreter accepts what the compiler refuses: change the kernel, run both.",
    "spill": "take a narrower slice, a shorter chunk, fewer stages, or more warps.",
    "shared": "take a narrower slice, a shorter chunk or fewer stages.",
    "tensor core": "give each dot sides of 16 or more; wgmma needs 64 rows and 4 warps.",
    "operands": "take other tiles, stages or warps, so that fewer uniform registers are wanted; "
    "nothing excuses this one.",
    "loads": "feed the dot what was loaded, give the loop 2 stages or more, and let masks and "
    "strides show that 8 neighbours lie together.",
    "occupancy": "undo what took registers or shared memory, or accept it with --update.",
    "head size": "add a configuration that fits to the kernel's table; nothing excuses this one.",
    "launches": "undo what added them, or accept it with --update.",
    "bytes": "keep states out of memory, with longer segments or fewer passes.",
    "allowed": "remove the entry from ALLOWED.",
}


class Complaint(NamedTuple):
    """Something that must not be; what to do about it says `REMEDIES`.

    Attributes:
        check, kernel, target, where: as in `Allowed`; `where` is the configuration or the case.
        message: what was expected, what came.
    """

    check: str
    kernel: str
    target: str
    where: str
    message: str

    def __str__(self):
        return f"{self.target} {self.kernel} [{self.where}]: {self.message}"


def check_figures(job, figures, stored=None):
    """Complaints about one compiled kernel.

    Args:
        stored: its row in resources.json, if that was written with this version of Triton.
    """

    def complain(check, message):
        found.append(Complaint(check, job.name, job.target, job.configuration, message))

    found = []
    if "error" in figures:
        complain("compile", figures["error"])
        return found
    if figures["spilled"] or figures["stack"]:
        complain(
            "spill",
            f"{figures['spilled']} spills and {figures['stack']} bytes of stack at "
            f"{figures['registers']} registers",
        )
    limit = DEVICES[job.target].shared_limit
    if figures["shared"] > limit:
        complain("shared", f"{figures['shared']} bytes, at most {limit}")
    if figures.get("stray"):
        complain(
            "operands",
            f"{figures['stray']} descriptors of wgmma that do not come from the address of "
            "shared memory: the kernel computes something else",
        )
    if figures["bfloat16_dots"]:
        if not figures["tensor_core"]:
            complain("tensor core", "no matrix instruction")
        elif job.target == "sm_90" and (figures["HMMA"] or not figures["HGMMA"]):
            complain(
                "tensor core",
                f"{figures['HGMMA']} HGMMA and {figures['HMMA']} HMMA, expected HGMMA alone",
            )
        if job.target == "sm_90" and job.is_wide:
            if figures["waits"] or figures["copies"] > figures["wide_copies"]:
                complain(
                    "loads",
                    f"{figures['wide_copies']} of {figures['copies']} asynchronous copies have "
                    f"128 bits, and the loop waits for {figures['waits']} loads of tiles",
                )
    if stored and figures["programs"] < stored.get("programs", 0):
        complain(
            "occupancy",
            f"{figures['programs']} programs to a multiprocessor, expected {stored['programs']} "
            f"({figures['registers']} registers, {figures['shared']} bytes shared)",
        )
    return found


def bytes_of(tensor):
    """Bytes that a tensor's elements take; one that is repeated by a stride of 0 takes once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(sizes).numel() * tensor.element_size()


def traffic(launches):
    """Bytes that a list of launches moves at least: every tensor argument once per launch."""
    return sum(
        bytes_of(x) for launch in launches for x in launch.arguments.values() if torch.is_tensor(x)
    )


def check_call(name, target, case, launches, stored=None):
    """(figures, complaints) of one public call for one target."""
    figures = {
        "launches": len(launches),
        "bytes": round(traffic(launches) / case.token_heads, 1),
    }
    found = []
    if case.max_bytes is not None and figures["bytes"] > case.max_bytes:
        parts = ", ".join(f"{x.name} {traffic([x]) / case.token_heads:.0f}" for x in launches)
        message = f"{figures['bytes']} bytes ({parts}), at most {case.max_bytes}"
        found.append(Complaint("bytes", "call", target, name, message))
    if stored and figures["launches"] > stored["launches"]:
        message = f"{figures['launches']} launches, expected {stored['launches']}"
        found.append(Complaint("launches", "call", target, name, message))
    return figures, found


def fits(job, figures):
    """Whether a kernel compiles, has the shared memory it wants and does not lack registers.

    The assembler sometimes parks a word or two to make room for more programs; that is no lack.
    """
    if "error" in figures or figures.get("stray"):
        return False
    return figures["stack"] <= 16 and figures["shared"] <= DEVICES[job.target].shared_limit


def check_head_sizes(reports):
    """Complaints for each kernel, target and case without one configuration that fits.

    Args:
        reports: (case's name, job, figures) triples. No `Allowed` excuses this.
    """
    groups = collections.defaultdict(list)
    for name, job, figures in reports:
        groups[job.name, job.target, name].append(fits(job, figures))
    return [
        Complaint("head size", *group, "no configuration fits")
        for group, good in groups.items()
        if not any(good)
    ]


def excuse(complaints, allowed, is_complete):
    """(complaints that stand, excused ones), after the list of accepted ones.

    Args:
        is_complete: whether everything was checked, so that an entry without a use is a complaint.
    """
    standing, excused, used = [], [], set()
    for complaint in complaints:
        entry = next((a for a in allowed if matches(a, complaint)), None)
        if entry is None or complaint.check in ("head size", "operands"):
            standing.append(complaint)
        else:
            used.add(entry)
            excused.append((complaint, entry.reason))
    if is_complete:
        standing += [
            Complaint("allowed", a.kernel, a.target or "all", a.where, f"{a.check}: occurs no more")
            for a in allowed
            if a not in used
        ]
    return standing, excused


def matches(allowed, complaint):
    """Whether an entry of the list of accepted complaints means this one."""
    return (
        (allowed.check, allowed.kernel) == (complaint.check, complaint.kernel)
        and allowed.target in ("", complaint.target)
        and allowed.where in complaint.where
    )


def collect(cases, targets=TARGETS):
    """What the cases launch: {(case's name, target): launches}."""
    found = {}
    for name, case in cases.items():
        for target in targets:
            with recording(run=False, target=target) as launches:
                case.run()
            found[name, target] = launches
    return found


def compile_all(jobs, processes=2):
    """{job: figures}, in the order of `jobs`, compiled in other processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs) or 1), mp_context=context) as pool:
        return dict(zip(jobs, pool.map(compile_job, jobs), strict=True))


def table_of(rows):
    """Lines of a table; rows are dicts with the same keys."""
    columns = list(rows[0]) if rows else []
    width = {c: max(len(str(c)), *(len(str(row[c])) for row in rows)) for c in columns}
    lines = ["  ".join(str(c).ljust(width[c]) for c in columns)]
    lines += ["  ".join(str(row[c]).ljust(width[c]) for c in columns) for row in rows]
    return [line.rstrip() for line in lines]


def worst_row(a, b):
    """The weaker figures of two jobs with the same key, which differ in what is divisible by 16."""
    if a is None or "error" in a or "error" in b:
        return b if a is None or "error" in b else a
    return a if (a["programs"], -a["registers"]) <= (b["programs"], -b["registers"]) else b


def write_table(calls, kernels):
    """Writes resources.json, a line for each call and kernel; without what does not compile."""
    fields = ("registers", "stack", "shared", "programs")
    rows = {k: {f: row[f] for f in fields} for k, row in kernels.items() if "error" not in row}
    parts = [f'"triton": "{triton.__version__}"']
    for name, part in (("calls", calls), ("kernels", rows)):
        lines = (f"{json.dumps(key)}: {json.dumps(part[key])}" for key in sorted(part))
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments=None):
    """Checks all cases; exit status 1 if there is a complaint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite resources.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count()))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton interprets instead of compiling: unset TRITON_INTERPRET.")
    cases = {name: case for name, case in CASES.items() if options.only in name}
    is_complete = cases.keys() == CASES.keys() and set(options.targets) == set(TARGETS)
    if options.update and not is_complete:
        parser.error("--update writes the whole table: leave out --only and --targets.")

    start = time.perf_counter()
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__}
    is_same_triton = stored["triton"] == triton.__version__
    old_calls, old_kernels = stored.get("calls", {}), stored.get("kernels", {})
    if options.update:
        old_calls, old_kernels = {}, {}
    elif not is_same_triton:
        old_kernels = {}

    complaints, calls, users = [], {}, collections.defaultdict(list)
    for (name, target), launches in collect(cases, options.targets).items():
        key = f"{target} {name}"
        calls[key], found = check_call(name, target, cases[name], launches, old_calls.get(key))
        complaints += found
        for launch in launches:
            job = specialise(launch, target, cases[name].is_wide)
            if name not in users[job]:
                users[job].append(name)
    figures = compile_all(list(users), options.processes)
    kernels = {}
    for job in figures:
        complaints += check_figures(job, figures[job], old_kernels.get(job.key))
        kernels[job.key] = worst_row(kernels.get(job.key), figures[job])
    complaints += check_head_sizes(
        [
            (name, job, figures[job])
            for job, names in users.items()
            for name in names
            if cases[name].must_fit
        ]
    )
    standing, excused = excuse(complaints, ALLOWED, is_complete and is_same_triton)
    report(calls, figures, standing, excused)
    print(f"{len(standing)} complaints, {len(excused)} accepted.")
    print(f"{len(figures)} kernels, {len(calls)} calls, {time.perf_counter() - start:.0f} s")
    if not is_same_triton:
        print(
            f"resources.json is of Triton {stored['triton']}, this is {triton.__version__}: "
            "occupancy was not compared."
        )
    if options.update:
        write_table(calls, kernels)
    return 1 if standing else 0


def report(calls, figures, standing, excused):
    """Prints the tables of calls and kernels, and what is wrong."""
    print("\n".join(table_of([{"call": key} | row for key, row in calls.items()])))
    print()
    rows = []
    for job, row in figures.items():
        rows.append(
            {
                "target": job.target,
                "kernel": job.name,
                "regs": row.get("registers", ""),
                "spills": row.get("spilled", ""),
                "shared": row.get("shared", ""),
                "programs": row.get("programs", ""),
                "mma": row.get("tensor_core", ""),
                "copies": row.get("wide_copies", ""),
                "waits": row.get("waits", ""),
                "s": row.get("seconds", ""),
                "configuration": job.configuration,
            }
        )
    print("\n".join(table_of(rows)))
    print()
    for reason in dict.fromkeys(reason for _, reason in excused):
        print(f"Accepted: {reason}")
        print("\n".join(f"    {c.check}: {c}" for c, why in excused if why == reason))
    for check in dict.fromkeys(complaint.check for complaint in standing):
        print(f"COMPLAINT, {check}: {REMEDIES[check]}")
        print("\n".join(f"    {c}" for c in dict.fromkeys(standing) if c.check == check))


if __name__ == "__main__":
    # Workers import this file under its own name, and their kernels as zoo.kernels.
    sys.exit(main())
