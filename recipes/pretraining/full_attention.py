"""What a recipe asks of layers of full attention, or with a memory, alone."""

from zoo.layers.cross_batch import train_across_batch
from zoo.layers.shifted_groups import train_in_groups
from zoo.layers.softmax_attention import SoftmaxAttention

from .usage import UsageError

COUNTING = ("alibi", "t5", "fire")  # distances are counted in tokens, whatever the positions


def settle_full_attention(recipe, model):
    """Sets `attention_shift_groups` and `cross_batch_range`, and refuses what has no use for them.

    Args:
        recipe: of the run.
        model: the language model, on any device.

    Raises:
        UsageError: no layer of full attention, for `position_skip` none that knows positions, or
            for `cross_batch_range` none with a memory.
    """
    if recipe.position_skip:
        _check_positions(recipe, model)
    if recipe.attention_shift_groups:
        try:
            train_in_groups(model, recipe.attention_shift_groups)
        except ValueError as error:
            raise UsageError(f"attention_shift_groups: {error}") from None
    if recipe.cross_batch_range:
        try:
            train_across_batch(model, recipe.cross_batch_range)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _check_positions(recipe, model):
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
    own = {module.position_type for module in full}
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
