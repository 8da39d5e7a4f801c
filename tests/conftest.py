"""Kernels run in Triton's interpreter where there is no GPU. It decides when triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
