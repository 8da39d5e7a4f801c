"""What must hold for a compiled kernel and for a call; resources.py lists it."""

import collections
from typing import NamedTuple

import torch

from zoo.kernels.bench.aot.devices import DEVICES

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
