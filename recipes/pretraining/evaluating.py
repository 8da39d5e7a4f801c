"""The figures of a run: of a step that was trained, and of held-out text."""

from .comparing import by_position_and_length
from .costs import peak_memory
from .measuring import diagnostics, held_out_figures, sample
from .reporting import bits_per_byte
from .synthetic import task_report


def step_figures(run, loss, speed):
    """What follows from a step's loss and speed, for a line of metrics.jsonl.

    Args:
        run: a `Run`, after the step.
        loss: in nats per token.
        speed: tokens per second.
    """
    figures = {}
    if not run.recipe.task:
        num_tokens, num_bytes = run.corpus.tokens_and_bytes()
        # Over the corpus's mean length of a token.
        figures["bits_per_byte"] = bits_per_byte(loss * num_tokens, num_bytes)
    figures["tokens_per_second"] = speed
    figures["peak_memory"] = peak_memory(run.accelerator.device)[0]
    if run.recipe.context_schedule:
        figures["sequence_length"] = run.recipe.sequence_length_at(run.step - 1)
    if run.peak_flops:
        # The share of the devices' peak that the operations of the definition take.
        flops = run.flops[run.recipe.sequence_length_at(run.step - 1)]
        figures["mfu"] = flops * speed / (run.peak_flops * run.accelerator.num_processes)
    return figures


def held_out_report(run):
    """Measures a model on held-out text or on its task's tests. All processes call it.

    Args:
        run: a `Run` between two steps.

    Returns:
        Name -> figure, and the lines for the terminal.
    """
    if run.recipe.task:
        return task_report(run)
    recipe, accelerator, model = run.recipe, run.accelerator, run.model
    figures, average = held_out_figures(accelerator, model, run.corpus.parts, recipe), ""
    value, *others = figures.values()
    if run.average.decay:
        with run.average.in_place():
            of_average = held_out_figures(accelerator, model, run.corpus.parts, recipe)
        figures["ema_bits_per_byte"] = of_average["bits_per_byte"]
        average = f", average {figures['ema_bits_per_byte']:.4f}"
    figures |= by_position_and_length(accelerator, model, run.corpus.held_out, recipe)
    figures |= diagnostics(accelerator, model, run.corpus.held_out, recipe)
    names = [f"{part.name} {x:.4f}" for part, x in zip(run.corpus.parts, others)]
    gzip = f"gzip -9: {run.corpus.record['held_out']['gzip_bits_per_byte']:.4f}"
    lines = [
        f"step {run.step}: held-out {value:.4f}{average} bits per byte "
        f"({', '.join([*names, gzip])})"
    ]
    for prompt in recipe.sample_prompts:
        text = sample(accelerator, model, run.tokenizer, prompt, recipe.sample_tokens, run.step)
        lines.append("  | " + text.replace("\n", "\n  | "))
    return figures, lines
