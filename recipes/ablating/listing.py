"""Models and trials of a sweep as tables for the terminal."""

from pretraining.costs import in_units

from .matching import length_of


def aligned(rows):
    """Rows of text as lines with columns of one width: the first to the left, the rest right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]


def list_models(sweep, by_task):
    """Lines about the models on each task: what was matched, by which width, and what they cost."""
    lines = []
    for task, found in by_task.items():
        how = f"matched by {sweep.match.by} to {sweep.match.reference}"
        lines.append(f"{task}: {how if sweep.match.by != 'none' else 'not matched'}")
        rows = [
            ["model", "parameters", "without embeddings", "MLP width", "off by"]
            + ["FLOPs per token", "in training", "state bytes"]
        ]
        for name, size in found.items():
            first = next(iter(size.state_bytes.values()))
            last = list(size.state_bytes.values())[-1]
            rows.append(
                [
                    name,
                    f"{size.parameters:,}",
                    f"{size.parameters_without_embeddings:,}",
                    str(size.intermediate_size),
                    f"{size.match['off']:+.2%}",
                    in_units(size.flops_per_token, ""),
                    in_units(size.training_flops_per_token, ""),
                    f"{first:,}" + (f" to {last:,}" if last != first else ""),
                ]
            )
        lines += [f"  {line}" for line in aligned(rows)]
    lines.append("Neither tokens' and positions' embeddings nor the output projection are matched.")
    return lines


def list_trials(plan):
    """Lines about the trials that are known, where they stand, and how many may come."""
    trials, rows, tokens = plan.trials(), [], 0
    for trial in trials:
        recipe = trial.recipe
        count = recipe.steps * recipe.batch_size * length_of(recipe)
        tokens += count
        score = (plan.outcome(trial) or (None, None))[1]
        rows.append(
            [trial.hash, trial.task, trial.model, f"{trial.learning_rate:g}", str(trial.seed)]
            + [trial.role, f"{count:,} tokens", trial.status()]
            + ["" if score is None else f"{score:.4f}"]
        )
    search, expected = plan.sweep.sweep, plan.expected()
    lines = aligned(rows)
    if expected > len(trials):
        seeds = ", ".join(map(str, search.seeds))
        lines.append(
            f"and about {expected - len(trials)} more, once rates are chosen: the best one on "
            f"seeds {seeds}, further ones where it lies at an edge, {search.baseline} once more"
        )
    return [*lines, f"{len(trials)} trials, {tokens:,} tokens; about {expected} in all"]
