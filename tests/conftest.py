"""Kernels run in Triton's interpreter where there is no GPU. It decides when triton is imported."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """What is imported by now stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    # And tracing makes so many objects that a young generation of Python's 700 is always full.
    gc.set_threshold(20_000, 10, 10)
