"""Where the numbers of official implementations are: random weights, token ids, outputs, gradients.

Copies of the small ones lie beside this file, without what no test reads; a workspace may hold all
of them, whole, in ../shared/goldens.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

COPIES = Path(__file__).resolve().parent / "goldens"
SHARED = COPIES.parents[3] / "shared" / "goldens"


def golden_folder(name):
    """The folder of one golden, the whole one if it is there."""
    for folder in (SHARED / name, COPIES / name):
        if folder.is_dir():
            return folder
    return pytest.skip(f"golden {name} is not in this clone")


def golden_tensors(name, file="golden"):
    """The tensors of one of its files."""
    return load_file(golden_folder(name) / f"{file}.safetensors")
