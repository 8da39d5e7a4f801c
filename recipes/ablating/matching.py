"""Makes models alike in parameters or operations, by the width of their MLPs, and says their sizes.

Parameters and operations are affine in `intermediate_size`, so two probes without memory (on meta)
give both numbers of the line; the model that comes of it is counted again.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from pretraining.building import build_config, build_model, tokenizer_of
from pretraining.costs import training_flops
from pretraining.recipe import UsageError
from zoo.core.state import state_bytes

TOLERANCE = 0.01  # how far a model may be off
LIVE = 10**8  # parameters of models that are built and run to look at their states
ROUND = 0.001  # how far for the sake of a width that is a multiple of 64 or 8, which runs faster


@dataclass
class Size:
    """What a model is on a task.

    Attributes:
        parameters: all of them.
        parameters_without_embeddings: without those of tokens and positions and without the output
            projection, which may be one of them.
        intermediate_size: width of the MLP.
        flops_per_token: forward, a mean over a text of the task's length.
        training_flops_per_token: forward and backward.
        state_bytes: of a live cache after texts of some lengths, of a large model as it declares
            it; length -> bytes.
        match: by, target, found, and how far off that is.
        fields: of the config, as its recipe says them.
    """

    parameters: int
    parameters_without_embeddings: int
    intermediate_size: int
    flops_per_token: float
    training_flops_per_token: float
    state_bytes: dict
    match: dict
    fields: dict


def build_on_meta(recipe):
    """The recipe's model, without memory."""
    recipe = replace(recipe, gradient_checkpointing=False)  # no part of a model's size
    config = build_config(recipe, tokenizer_of(recipe))
    with torch.device("meta"):
        return build_model(recipe, config)


def length_of(recipe):
    """Tokens of the texts that a recipe trains on."""
    return recipe.sequence_length


def without_embeddings(model):
    """Parameters beside embeddings, of tokens and positions, and the output projection."""
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= {id(p) for p in model.get_output_embeddings().parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def amount(model, by, length):
    """What models are matched by: parameters without embeddings, or training FLOPs per token."""
    return training_flops(model, length) if by == "flops" else without_embeddings(model)


def widths(sweep, task):
    """The MLP's width of each model on a task, None where the tables say it.

    Raises:
        UsageError: a model that no width makes like the reference.
    """
    by, reference = sweep.match.by, sweep.match.reference
    found = dict.fromkeys(sweep.models)
    if by == "none":
        return found
    recipe = _recipe(sweep, task, reference)
    target = amount(build_on_meta(recipe), by, length_of(recipe))
    for name in sweep.models:
        if name != reference:
            found[name] = _solve(sweep, task, name, target)
    return found


def _recipe(sweep, task, model, width=None):
    return sweep.resolve(task, model, sweep.sweep.learning_rates[0], 0, width)


def _solve(sweep, task, name, target):
    by = sweep.match.by

    def of_width(width):
        recipe = _recipe(sweep, task, name, width)
        return amount(build_on_meta(recipe), by, length_of(recipe))

    first, second = (of_width(width) for width in (64, 128))
    slope = (second - first) / 64
    base = first - 64 * slope
    if slope <= 0:
        raise UsageError(
            f"{name} on {task}: its {by} do not depend on intermediate_size, so it cannot be made "
            f'to match {sweep.match.reference}; say [match] by = "none".'
        )
    exact = (target - base) / slope
    if exact < 1:
        raise UsageError(
            f"{name} on {task}: even without an MLP it has {base:,.0f} {by}, "
            f"{base / target - 1:+.1%} off the {target:,.0f} of {sweep.match.reference}; make the "
            f"MLP of that wider, or {name} smaller."
        )
    for multiple in (64, 8, 1):
        width = max(1, round(exact / multiple)) * multiple
        if abs(width - exact) * slope <= ROUND * target:
            break
    off = of_width(width) / target - 1
    if abs(off) > TOLERANCE:
        raise UsageError(
            f"{name} on {task}: with intermediate_size = {width}, the best there is, it is off by "
            f"{off:+.1%} in {by} from {sweep.match.reference}, more than {TOLERANCE:.0%}; make the "
            "models larger."
        )
    return width


def sizes(sweep, task, widths):
    """The `Size` of each model on a task, counted on the model that will be trained.

    Args:
        sweep: a `Sweep`.
        task: a key of its tasks.
        widths: of each model's MLP, as `widths` found them.

    Returns:
        Name of the model -> `Size`.
    """
    by, found = sweep.match.by, {}
    recipes = {name: _recipe(sweep, task, name, width) for name, width in widths.items()}
    models = {name: build_on_meta(recipe) for name, recipe in recipes.items()}
    reference = sweep.match.reference
    target = amount(models[reference], by, length_of(recipes[reference]))
    for name, model in models.items():
        recipe, length = recipes[name], length_of(recipes[name])
        value = amount(model, by, length)
        lengths = sorted({length, *recipe.eval_lengths, *recipe.eval_contexts})
        count = sum(p.numel() for p in model.parameters())
        if count <= LIVE:
            states = live_state_bytes(recipe, lengths)
        else:
            states = {str(n): model.state_size(n) for n in lengths}
        found[name] = Size(
            parameters=count,
            parameters_without_embeddings=without_embeddings(model),
            intermediate_size=model.config.intermediate_size,
            flops_per_token=model.flops_per_token(length),
            training_flops_per_token=training_flops(model, length),
            state_bytes=states,
            match={"by": by, "target": target, "found": value, "off": value / target - 1},
            fields=recipe.model,
        )
    return found


@torch.no_grad()
def live_state_bytes(recipe, lengths):
    """Bytes of the state that a model has after texts of some lengths, one sequence each.

    Args:
        recipe: of the model, which is built and run.
        lengths: in tokens.

    Returns:
        length, as a string -> bytes.
    """
    config = build_config(recipe, tokenizer_of(recipe))
    model, found = build_model(recipe, config).eval(), {}
    for length in lengths:
        ids = torch.zeros(1, length, dtype=torch.long)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        found[str(length)] = state_bytes(cache)
    return found


def models_of(sweep, by_task):
    """What results.json says of each model.

    Args:
        sweep: a `Sweep`.
        by_task: task -> name of a model -> `Size`.
    """
    main = next((task for task in sweep.tasks if sweep.lower_is_better(task)), None)
    main = main or next(iter(sweep.tasks))
    return {
        name: {
            "architecture": table["architecture"],
            **asdict(by_task[main][name]),
            "per_task": {task: asdict(found[name]) for task, found in by_task.items()},
            "speed": [],
        }
        for name, table in sweep.models.items()
    }
