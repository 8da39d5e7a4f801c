"""What all tests share.

Kernels run in Triton's interpreter where there is no GPU. It decides when triton is imported.
"""

import gc
import logging
import os

import pytest
import torch
from forks import Forks

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# pytest hangs its handlers on every logger that passes nothing on, and torch describes whatever it
# traces, graphs and guards, as soon as its log of that has a handler.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish():
    """What is imported by now stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    # And tracing makes so many objects that a young generation of Python's 700 is always full.
    gc.set_threshold(20_000, 10, 10)


# What the contract's script imports before it loads an exported folder, and what transformers does
# as soon as a folder's code asks for a PreTrainedModel.
IMPORTED = [
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
]


@pytest.fixture(scope="session")
def forks_without_zoo(tmp_path_factory):
    """Forks that have imported transformers and no zoo; huggingface_hub's cache is `home`/hub."""
    home = tmp_path_factory.mktemp("home")
    # Read when they are imported.
    places = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    forks = Forks(IMPORTED, env=places | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    forks.home = home
    yield forks
    forks.close()
