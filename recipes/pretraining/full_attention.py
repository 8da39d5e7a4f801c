"""What a recipe asks of layers of full attention alone."""

from zoo.layers.softmax_attention import SoftmaxAttention

from .usage import UsageError

COUNTING = ("alibi", "t5", "fire")  # distances are counted in tokens, whatever the positions


def check_positions(recipe, model):
    """Refuses `position_skip` for a model in which it would change nothing, or nothing of use.

    Args:
        recipe: of the run.
        model: the language model, on any device.

    Raises:
        UsageError: no layer of full attention, or one that counts tokens.
    """
    if not recipe.position_skip:
        return
    name, config = recipe.architecture, model.config
    attentions = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
    remedy = "use full attention (sliding_window = 'none', or softmax_layers of a hybrid)."
    if not attentions:
        raise UsageError(
            f"position_skip skips positions of softmax attention, and this {name} has none (a "
            f"recurrence counts tokens, or loses them); {remedy}"
        )
    full = [module for module in attentions if module.window is None]
    if not full:
        raise UsageError(
            f"position_skip trains distances that a window of {attentions[0].window} tokens never "
            f"sees; {remedy}"
        )
    kinds = getattr(config, "position_embedding_type", "rope")
    if not isinstance(kinds, (list, tuple)):
        kinds = [kinds] * config.num_hidden_layers
    own = {kinds[module.layer_idx] for module in full}
    counting = [str(kind) for kind in COUNTING if kind in own]
    if getattr(config, "rope_extension", None):
        counting.append(f"rope_extension {config.rope_extension['type']}")
    if counting:
        raise UsageError(
            f"position_skip skips positions; {' and '.join(counting)} counts tokens; use rope or "
            "xpos."
        )
    if own == {None}:
        raise UsageError(
            "position_skip skips positions, and without a position_embedding_type there are none; "
            "use rope or xpos."
        )
