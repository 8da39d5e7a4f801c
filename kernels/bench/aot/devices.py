"""The devices that kernels are compiled for."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget

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
