"""What a continuation may change of the run that it continues."""

import dataclasses

from .recipe import Recipe, UsageError

# The numbers of the steps do not depend on these (micro_batch_size, cpu_threads and
# sequence_parallel move them by rounding alone).
FREE_KEYS = frozenset(
    "name output_dir cache_dir micro_batch_size cpu_threads gradient_checkpointing loss_chunk_size "
    "replay_segment_length eval_every eval_batch_size eval_positions eval_lengths eval_contexts "
    "sample_prompts sample_tokens log_every peak_flops checkpoint_every keep_checkpoints "
    "async_checkpoints trackers tokenising_workers sequence_parallel".split()
)
# What the hashes of text and tokenizer in a checkpoint say better than a name.
IDENTIFIED_KEYS = frozenset(
    "data data_config data_split text_column streaming sources held_out eval_bytes "
    "tokenizer".split()
)
SCHEDULE_KEYS = frozenset(
    "learning_rate schedule warmup_steps decay_steps min_learning_rate steps".split()
)
# What a run can be rescued with from divergence: each step reads them afresh from the recipe.
RESCUE_KEYS = SCHEDULE_KEYS | {"gradient_clip", "skip_spikes", "max_skipped", "z_loss"}


def changes_history(old, new, step, precision=None):
    """Which keys make `new` a different run from the one that trained `step` steps with `old`.

    The schedule may change as long as the steps behind stay as they were, so that a finished WSD
    run can be continued from its stable phase with more steps.

    Args:
        old: a recipe as a dictionary. What it lacks had the value that is the default now.
        new: a `Recipe`.
        step: number of steps done.
        precision: that they were done in, "fp32" or "bf16"; None: not known.

    Returns:
        Key -> "key: old -> new", empty if the run can go on.
    """
    current = dataclasses.asdict(new)
    old = {**dataclasses.asdict(Recipe("a name", new.architecture)), **old}
    free = FREE_KEYS | IDENTIFIED_KEYS
    changed = {key for key in current if key not in free and current[key] != old[key]}
    if precision:
        old["precision"] = precision
        if current["precision"] in ("auto", precision):  # "auto" is what the run began with
            changed.discard("precision")
    weights = [{s["name"]: s.get("weight", 1) for s in each["sources"]} for each in (old, current)]
    if weights[0] != weights[1]:
        old, current = {**old, "sources": weights[0]}, {**current, "sources": weights[1]}
        changed.add("sources")
    if changed & SCHEDULE_KEYS and new.steps >= step:
        before = Recipe(**{**current, **{key: old[key] for key in SCHEDULE_KEYS}})
        if all(before.learning_rate_at(s) == new.learning_rate_at(s) for s in range(step)):
            changed -= SCHEDULE_KEYS
    return {key: f"{key}: {old[key]!r} -> {current[key]!r}" for key in sorted(changed)}


def check_changes(checkpoint, recipe, diverged, change_schedule, precision=None):
    """What a continuation changes of its run although the steps behind were done otherwise.

    After a divergence a gentler schedule is what the run needs; else it takes an explicit word.

    Args:
        checkpoint: what is continued.
        recipe: of the continuation.
        diverged: steps at which the run diverged so far.
        change_schedule: whether the user asked for another schedule from here on.
        precision: as of `changes_history`.

    Returns:
        Descriptions "key: old -> new", for the record.

    Raises:
        UsageError: the recipe is that of another run.
    """
    before = checkpoint.manifest["recipe"]
    changed = changes_history(before, recipe, checkpoint.step, precision)
    is_schedule = set(changed) <= RESCUE_KEYS and recipe.steps >= checkpoint.step
    is_rescue = any(step > checkpoint.step for step in diverged)
    if changed and not (is_schedule and (is_rescue or change_schedule)):
        hint = "use the new schedule from here on with --change_schedule, " if is_schedule else ""
        raise UsageError(
            f"{checkpoint.folder} was trained otherwise ({'; '.join(changed.values())}); undo the "
            f"change, {hint}or start a new run with --name."
        )
    return list(changed.values())
