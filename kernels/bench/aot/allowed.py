"""Complaints that are accepted, each with its reason."""

from typing import NamedTuple

from zoo.kernels.bench.aot.checks import Complaint


class Allowed(NamedTuple):
    """A complaint that is accepted, with the reason. One that no longer occurs is a complaint.

    Attributes:
        check: its name, as in resources.py's docstring.
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
