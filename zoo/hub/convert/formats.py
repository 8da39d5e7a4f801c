"""The foreign formats by name, one file each, and which of them another library's class reads."""

import difflib

from . import (
    fla_gated_deltanet,
    fla_retnet,
    fla_rwkv6,
    fla_rwkv7,
    hf_minimax,
    hf_mistral,
    hf_rwkv,
    infini_beomi,
    infini_lucidrains,
    meliad,
    mistral_consolidated,
    rwkv6_hf,
    rwkv_pth,
    torchscale_longnet,
    torchscale_retnet,
    transnormerllm,
)
from .format import LIBRARIES

_FILES = (
    torchscale_retnet,
    fla_retnet,
    rwkv_pth,
    hf_rwkv,
    rwkv6_hf,
    fla_rwkv6,
    fla_rwkv7,
    fla_gated_deltanet,
    transnormerllm,
    hf_minimax,
    hf_mistral,
    meliad,
    mistral_consolidated,
    infini_beomi,
    infini_lucidrains,
    torchscale_longnet,
)
FORMATS = {file.FORMAT.name: file.FORMAT for file in _FILES}


def find_format(name):
    """The format of a name.

    Raises:
        ValueError: there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMATS)}."
    raise ValueError(f"unknown format {name!r}; {hint}")


def native_format(architecture):
    """The format of another library's own class for an architecture.

    Where several have one, transformers' comes first, which needs no further package.

    Args:
        architecture: a key of `zoo.MODELS`.

    Raises:
        ValueError: there is none that can be written.
    """
    written = [f for f in FORMATS.values() if f.architecture and f.library is not None]
    for library in LIBRARIES:
        for format in written:
            if format.architecture == architecture and format.library is library:
                return format
    there = "; ".join(
        f"{library.name} for {', '.join(f.architecture for f in written if f.library is library)}"
        for library in LIBRARIES
    )
    raise ValueError(
        f"no other library has a class for {architecture} that can be written; {there} have. "
        "Export it with its own code instead (--format zoo)."
    )
