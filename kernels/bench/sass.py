"""Reads NVIDIA machine code: do matrix instructions take their operands from where they should?

The assembler of CUDA 12.8, which Triton 3.6 and 3.7 bring, can miscompile a kernel for sm_90 that
runs out of uniform registers: it makes the descriptor of a wgmma, which says where in shared
memory an operand lies, before it has the address that goes into it, out of what the register
happens to hold (the number of tokens, say). The kernel then reads elsewhere. Seen on an H100 with
heads of 512 channels and chunks of 64: gradients wrong by eight times their size, or an illegal
access, by what elsewhere is. No spill, no message, and the interpreter knows nothing of it.

`stray_descriptors` finds it without a GPU. The address of shared memory has one source, the number
of the program within its cluster. What is calculated from that is followed through the registers
along every path; a descriptor that comes from elsewhere on any path is stray.
"""

import collections
import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of `cuobjdump -sass`.

    Attributes:
        address: bytes from the kernel's start.
        is_conditional: whether a predicate decides if it runs.
        operation: with its suffixes, such as "HGMMA.64x64x16.F32.BF16".
        operands: as printed.
    """

    address: int
    is_conditional: bool
    operation: str
    operands: list[str]


# The part of an address in shared memory that all programs have in common starts from this.
SOURCE = "SR_CgaCtaId"
# What writes no register, and what writes data: nothing that is calculated from its operands.
STORES = ("ST", "RED", "LDGSTS", "BAR", "BRA", "EXIT", "UTMA", "SYNCS", "UBLK", "NANOSLEEP")
DATA = ("LDS", "LDG", "HGMMA", "HMMA", "ATOM")
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")


def instructions(sass):
    """The `Instruction`s of one kernel in the text of `cuobjdump -sass`."""
    found = []
    for line in sass.splitlines():
        if match := LINE.match(line):
            address, predicate, operation, operands = match.groups()
            parts = [x.strip() for x in operands.split(",")] if operands else []
            found.append(Instruction(int(address, 16), bool(predicate), operation, parts))
    return found


def registers(operand):
    """Names of the registers in an operand; one with the suffix .64 is two."""
    found = []
    for kind, number, is_wide in re.findall(r"\b(U?R)(\d+)(?:\.reuse)?(\.64)?", operand):
        found += [f"{kind}{int(number) + i}" for i in range(2 if is_wide else 1)]
    return found


def written(instruction):
    """Names of the registers that an instruction writes; a place on the stack counts as one."""
    operation, operands = instruction.operation, instruction.operands
    if operation.startswith("STL"):
        return operands[:1]
    if not operands or operation.startswith(STORES):
        return []
    match = re.match(r"(U?R)(\d+)", operands[0])
    if not match:
        return []
    width = 1
    if re.search(r"\.(64|WIDE)\b|^CS2R", operation):
        width = 2
    if re.search(r"\.128\b", operation) or (operation.startswith("LDSM") and ".4" in operation):
        width = 4
    if shape := re.match(r"HGMMA\.64x(\d+)x", operation):
        width = int(shape.group(1)) // 2
    return [f"{match.group(1)}{int(match.group(2)) + i}" for i in range(width)]


def after(instruction, known):
    """The registers that come from the address of shared memory, after one instruction."""
    targets = written(instruction)
    if not targets:
        return known
    sources = [name for operand in instruction.operands[1:] for name in registers(operand)]
    if ".64" in instruction.operation:  # operands are pairs, by the name of the first
        sources += [re.sub(r"\d+", lambda n: str(int(n.group()) + 1), name) for name in sources]
    sources += instruction.operands[1:]  # SOURCE, places on the stack
    if instruction.operation.startswith(DATA) or known.isdisjoint(sources):
        return known - set(targets)
    return known if instruction.is_conditional else known | set(targets)


def descriptors(instruction):
    """The first registers of the descriptors that a wgmma takes, of four that it names: those of
    A, unless A is in registers, and of B."""
    if not instruction.operation.startswith("HGMMA"):
        return []
    operands = instruction.operands
    place = next(i for i, x in enumerate(operands) if x.startswith("gdesc["))
    first = int(re.search(r"UR(\d+)", operands[place]).group(1))
    return [f"UR{first + 2}"] if place > 1 else [f"UR{first}", f"UR{first + 2}"]


def stray_descriptors(code):
    """Descriptors of wgmma that do not come from the address of shared memory on every path.

    Args:
        code: `instructions` of one kernel.

    Returns:
        (address of the instruction, register) pairs.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    known = {0: frozenset([SOURCE])}
    waiting = collections.deque([0] if code else [])
    while waiting:
        i = waiting.popleft()
        state = after(code[i], known[i])
        operation = code[i].operation
        following = []
        if operation.startswith("BRA") and code[i].operands[-1].startswith("0x"):
            following.append(at[int(code[i].operands[-1], 16)])
        if not operation.startswith(("BRA", "EXIT", "RET")) or code[i].is_conditional:
            following.append(i + 1)
        for j in following:
            merged = state & known[j] if j in known else state
            if j < len(code) and known.get(j) != merged:
                known[j] = merged
                waiting.append(j)
    return [
        (code[i].address, name)
        for i in sorted(known)
        for name in descriptors(code[i])
        if name not in known[i]
    ]
