"""What a model is, in a few lines: `zoo info MODEL`."""

import difflib
from pathlib import Path

from .. import MODELS
from .card import state_in_words
from .download import NAME, fetch
from .folder import head_of, read_config, settings
from .guard import empty_model


def describe(model):
    """A text about an architecture or one of our models.

    Args:
        model: a key of `zoo.MODELS`, for its default config, or a folder, or OWNER/NAME on the Hub.

    Returns:
        Lines of text.

    Raises:
        ValueError: neither, or a folder without a config of ours.
    """
    if model in MODELS:
        architecture, config = MODELS[model], MODELS[model].config()
    elif Path(model).is_dir():
        architecture, config = read_config(model, classifiers=True)
    elif NAME.fullmatch(model):
        architecture, config = read_config(fetch(model, weights=False), classifiers=True)
    else:
        near = difflib.get_close_matches(model, MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MODELS)}."
        raise ValueError(f"{model!r} is neither a folder nor an architecture; {hint}")
    model_class = getattr(architecture, head_of(architecture, config))
    network = empty_model(model_class, config, model)
    constant = network.state_size(0)
    num_parameters = sum(p.numel() for p in network.parameters())
    lines = [
        f"{architecture.name}: {model_class.__name__}, model_type {config.model_type}",
        f"parameters {num_parameters:,}",
        f"{state_in_words(constant, network.state_size(1) - constant)} (float32)",
        "config",
        *(f"  {name} = {value!r}" for name, value in settings(config).items()),
    ]
    if config.variants:
        lines.append("variants")
        for name, fields in config.variants.items():
            listed = ", ".join(f"{key} = {value!r}" for key, value in fields.items())
            lines.append(f"  {name}: {listed or 'the defaults'}")
    return "\n".join(lines)
