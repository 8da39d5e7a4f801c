"""Whether an exported folder's weights are what its config and index say, before a push."""

from pathlib import Path

from .. import MODELS
from .files import INDEX
from .folder import CLASSIFIERS, build_model, current_names, find_weights, read_config, read_json
from .messages import some
from .tensors import open_files


def outline(folder):
    """The weights of an exported folder, lazy: nothing of their size is read.

    Args:
        folder: holds model.safetensors, or shards and their index.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: damaged files, a tensor that is no plain float, or an index that says something
            else than the shards.
    """
    folder, paths = Path(folder), find_weights(folder)
    tensors = open_files(paths)
    places = {name: path.name for path in paths for name in open_files([path])}
    for name, x in tensors.items():
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{folder / places[name]}: {name} is {kind}, not a plain float.")
    if (folder / INDEX).is_file():
        said = read_json(folder / INDEX)["weight_map"]
        wrong = [n for n in said | places if said.get(n) != places.get(n)]
        if wrong:
            raise ValueError(
                f"{folder / INDEX} says another file of {some(sorted(wrong))} than holds it; "
                "export again."
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
