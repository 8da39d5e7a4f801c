"""What a folder's weights are, by the headers of its files alone: nothing of their size is read."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import MODELS
from .files import INDEX
from .folder import CLASSIFIERS, build_model, current_names, find_weights, read_config, read_json
from .messages import one_line, some

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def outline(folder):
    """The weights of an exported folder, without their values.

    Args:
        folder: holds model.safetensors, or shards and their index.

    Returns:
        Name -> tensor on the meta device.

    Raises:
        ValueError: damaged files, a tensor that is no plain float, or an index that says something
            else than the shards.
    """
    folder, tensors, places = Path(folder), {}, {}
    for path in find_weights(folder):
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {n: (x.get_dtype(), x.get_shape()) for n, x in found.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({one_line(error)}); it is damaged or "
                "not fully downloaded: get it again."
            ) from None
        for name, (dtype, shape) in shapes.items():
            if dtype not in _DTYPES:
                raise ValueError(f"{path}: {name} is {dtype}, not a plain float.")
            tensors[name] = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        places |= dict.fromkeys(shapes, path.name)
    index = folder / INDEX
    if index.is_file():
        said = read_json(index)["weight_map"]
        wrong = [n for n in said | places if said.get(n) != places.get(n)]
        if wrong:
            raise ValueError(
                f"{index} says another file of {some(sorted(wrong))} than holds it; export again."
            )
    return tensors


def check_weights(folder):
    """Raises a ValueError if an exported folder's weights do not fit its config.

    Of other libraries' classes, and of a decoder without a head, the files alone are checked.

    Args:
        folder: the exported one.
    """
    tensors, config = outline(folder), read_json(Path(folder) / "config.json")
    of_ours = [a for a in MODELS.values() if a.config.model_type == config.get("model_type")]
    heads = {getattr(a, head).__name__ for a in of_ours for head in ("causal_lm", *CLASSIFIERS)}
    if heads & set(map(str, config.get("architectures") or [])):
        architecture, config = read_config(folder, classifiers=True)
        build_model(architecture, config, current_names(folder, tensors), folder)
