"""Figures of a compiled kernel, read from its machine code and from Triton's code for it."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

import triton

from zoo.kernels.bench import sass

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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
