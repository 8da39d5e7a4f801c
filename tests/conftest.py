"""Kernels run in Triton's interpreter where there is no GPU. It decides when triton is imported."""

import gc
import os

import torch

# Graphs and interpreted kernels make millions of small objects, and hardly any circle of them:
# looking for circles after every 700 takes about a tenth of the time of compiling.
gc.set_threshold(50_000, 20, 50)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
