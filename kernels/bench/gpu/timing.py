"""Times and memory of contenders on a device; README.md says how they are taken."""

import math
import statistics
import time

import torch

from zoo.kernels.bench.gpu.checking import check_and_warm_up
from zoo.kernels.bench.gpu.workloads import OTHER_FUNCTIONS


class Gpu:
    """Times on a CUDA or ROCm device."""

    def __init__(self, device):
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.name = properties.name
        # Several times the L2 cache: what a call reads is not there from the call before.
        self.flushed = torch.empty(1 << 28, dtype=torch.int8, device=device)
        self.flush_seconds = self.elapsed(self.flushed.zero_, 0)
        self.flush_seconds = self.elapsed(self.flushed.zero_, 0)

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def elapsed(self, function, flushes):
        """Seconds on the device of one call, after the cache was overwritten `flushes` times."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self.flushed.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def flushes_for(self, host_seconds):
        """Flushes that keep the device busy until the host has asked for everything."""
        return 1 + math.ceil(1.5 * host_seconds / self.flush_seconds)

    def peak(self, function):
        """Most bytes that one call allocates on top of its inputs."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def ceilings(self):
        """(bytes per second of a copy, FLOP per second of a bfloat16 matrix product), measured."""
        x = torch.randn(1 << 29, device=self.device).bfloat16()
        y = torch.empty_like(x)
        a, b = (torch.randn(8192, 8192, device=self.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        copy = statistics.median(self.elapsed(lambda: y.copy_(x), 1) for _ in range(10))
        product = statistics.median(
            self.elapsed(lambda: torch.mm(a, b, out=out), 1) for _ in range(10)
        )
        return 2 * x.numel() * x.element_size() / copy, 2 * 8192**3 / product


class Cpu:
    """Stands in for a device where there is none: the harness runs, its times mean nothing."""

    name = "cpu"
    device = torch.device("cpu")

    def synchronize(self):
        pass

    def elapsed(self, function, flushes):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def flushes_for(self, host_seconds):
        return 0

    def peak(self, function):
        function()
        return 0

    def ceilings(self):
        return 1e10, 1e11


def host_seconds(device, function):
    """Seconds for which one call keeps the host, the median of three rows of calls."""
    samples = []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            function()
        samples.append((time.perf_counter() - start) / 5)
    device.synchronize()
    return statistics.median(samples)


def measure(device, workload, mode, ceilings, seconds):
    """All figures of one mode of a workload, contenders in turns.

    Args:
        ceilings: (bytes per second, FLOP per second) of the device.
        seconds: about how long the timing may take.
    """
    functions, known = check_and_warm_up(device, workload, mode)
    moved, computed = workload.floors[mode]
    floors = {"bytes": moved / ceilings[0], "FLOPs": computed / ceilings[1]}
    floor_of = max(floors, key=floors.get)
    record = {"floor_ms": milliseconds(floors[floor_of]), "floor_of": floor_of, "by": known}
    if not functions:
        return record
    hosts = {name: host_seconds(device, function) for name, function in functions.items()}
    # Decoding is what a loop of it sees, the host included: many calls in a row.
    in_a_row, flushes = (
        (50, 0) if mode == "decode" else (1, device.flushes_for(max(hosts.values())))
    )

    def sample(function):
        def row():
            for _ in range(in_a_row):
                function()

        return device.elapsed(row, flushes) / in_a_row

    start = time.perf_counter()
    samples = {name: [sample(function)] for name, function in functions.items()}
    one_round = time.perf_counter() - start
    for _ in range(max(2, min(50, int(seconds / one_round)))):
        for name, function in functions.items():
            samples[name].append(sample(function))
    for name, function in functions.items():
        times = sorted(samples[name])
        median = statistics.median(times)
        known[name] |= {
            "ms": milliseconds(median),
            "low_ms": milliseconds(times[len(times) // 10]),
            "high_ms": milliseconds(times[-1 - len(times) // 10]),
            "samples": len(times),
            "host_us": round(1e6 * hosts[name], 1),
            "peak_mb": round(device.peak(function) / 1e6, 1),
        }
        if name not in OTHER_FUNCTIONS:
            known[name]["of_floor"] = round(floors[floor_of] / median, 3)
        if name != "ours" and "ours" in functions:
            known[name]["ratio"] = round(median / statistics.median(samples["ours"]), 2)
    return record


def milliseconds(seconds):
    """For a JSON file: four digits."""
    return float(f"{1000 * seconds:.4g}")
