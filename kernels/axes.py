"""The alphabet of shape suffixes: `q_BTHK` is a tensor of shape [batch, time, heads, key dim].

Tensors in zoo/ and in reference functions end in their axes; public operator arguments and
Hugging Face boundaries keep plain names (`q`, `input_ids`).
"""

AXES = {
    "B": "batch",
    "T": "time (target positions)",
    "S": "source time",
    "D": "model width",
    "F": "mlp width",
    "H": "heads",
    "K": "key dim of a head",
    "V": "value dim of a head",
    "C": "positions of a chunk",
    "N": "chunks or documents",
    "M": "memory slots",
    "W": "window",
    "R": "rank",
}
