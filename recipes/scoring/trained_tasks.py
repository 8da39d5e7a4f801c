"""The synthetic task that a run was trained on, measured as the run measures it."""

from pretraining.recipe import UsageError
from pretraining.synthetic import accuracy_figures, as_inputs, sum_stacked
from tasks import load

from .command_line import TEXT_OPTIONS
from .measures import Here, state_sizes

OF_TEXT = (*TEXT_OPTIONS, "sequence_length", "contexts", "tasks", "whole", "write_lm_eval")


def task_figures(subject, options):
    """Accuracy on each test of a model's task, and its state after examples of each length.

    Args:
        subject: the model; its recipe has a task.
        options: of the command line.

    Raises:
        UsageError: options that are of text.
    """
    for name in OF_TEXT:
        if getattr(options, name):
            raise UsageError(
                f"{subject.name} was trained on the task {subject.recipe.task['name']}, not on "
                f"text; leave out --{name}."
            )
    model, recipe = subject.model, subject.recipe
    task, tests = load(recipe.task), load(recipe.task).tests()
    sum_stacked(model)
    figures = {"task": task.table(), "task_sha256": task.sha256}
    figures |= accuracy_figures(Here(model.device), model, task, recipe)
    model.eval()
    sizes = {}
    for name in {task.length_of(settings): name for name, settings in tests.items()}.values():
        ids = as_inputs(task.test_batch(name, 0, 1))["input_ids"][0]
        sizes |= state_sizes(model, ids, [len(ids)])
    figures["state_bytes"] = {str(length): size for length, size in sorted(sizes.items())}
    return figures
