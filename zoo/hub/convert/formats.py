"""The foreign formats by name, one file each, and which of them another library's class reads."""

import difflib

from . import (
    armt_hf_gpt2,
    fla_gated_deltanet,
    fla_retnet,
    fla_rwkv6,
    fla_rwkv7,
    hf_bloom,
    hf_falcon,
    hf_minimax,
    hf_mistral,
    hf_mpt,
    hf_rwkv,
    hf_smollm3,
    infini_beomi,
    infini_lucidrains,
    landmark_gpt,
    landmark_llama,
    longllama,
    meliad,
    mistral_consolidated,
    rmt_hf_gpt2,
    rmt_lmrmt,
    rwkv6_hf,
    rwkv_pth,
    torchscale_longnet,
    torchscale_retnet,
    transfo_xl_hf,
    transformer_xl,
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
    hf_smollm3,
    hf_mpt,
    hf_bloom,
    hf_falcon,
    meliad,
    mistral_consolidated,
    infini_beomi,
    infini_lucidrains,
    longllama,
    landmark_llama,
    landmark_gpt,
    torchscale_longnet,
    transfo_xl_hf,
    transformer_xl,
    rmt_hf_gpt2,
    rmt_lmrmt,
    armt_hf_gpt2,
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


def native_format(architecture, config=None):
    """The format of another library's own class for an architecture.

    Where several have one, transformers' comes first, which needs no further package; where that
    has several classes, the first that can express the config.

    Args:
        architecture: a key of `zoo.MODELS`.
        config: of the model; None: the first class is meant.

    Raises:
        ValueError: there is none that can be written, or none for this config, and why not.
    """
    written = [f for f in FORMATS.values() if f.architecture and f.library is not None]
    candidates = [
        format
        for library in LIBRARIES
        for format in written
        if format.architecture == architecture and format.library is library
    ]
    refusals = []
    for format in candidates:
        try:
            if config is not None and len(candidates) > 1:
                format.write_config(config)
        except ValueError as error:
            refusals.append(f"{format.name}: {str(error).rstrip('.')}")
        else:
            return format
    if refusals:
        raise ValueError(f"no other library has a class for this model: {'; '.join(refusals)}.")
    there = "; ".join(
        f"{library.name} for {', '.join(f.architecture for f in written if f.library is library)}"
        for library in LIBRARIES
    )
    raise ValueError(
        f"no other library has a class for {architecture} that can be written; {there} have. "
        "Export it with its own code instead (--format zoo)."
    )
