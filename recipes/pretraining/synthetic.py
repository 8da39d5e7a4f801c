"""Training and measuring on a synthetic task (recipes/tasks) in place of text."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from tasks import Task, load
from tasks.definition import TRAINED, UNSCORED

from .corpus import tokenizer_hash
from .position_skip import Skipping
from .slicing import share_of


@dataclass
class Generated:
    """A task where a run has a text.

    Attributes:
        task: of the run.
        record: what identifies it, for run.json and checkpoints.
    """

    task: Task
    record: dict


def load_task(recipe, tokenizer):
    """The `Generated` of a recipe with a task."""
    task = load(recipe.task)
    record = {"source": f"the task {task.name}", "sha256": task.sha256}
    return Generated(task, {**record, "tokenizer_sha256": tokenizer_hash(tokenizer)})


def as_inputs(batch):
    """A task's batch as the arguments of a model that `sum_stacked` was called for."""
    return {"input_ids" if name == "stacked_ids" else name: x for name, x in batch.items()}


def sum_stacked(model):
    """Makes a model take ids [B, T, 2] too: the embeddings of both are summed.

    That is done where they are looked up, so that wrappers of data parallelism and shards see it,
    and what a model makes of embeddings (a factor, a norm) it makes of the sum.
    """

    def add(embedding, arguments, embeds):
        return embeds.sum(-2) if arguments[0].ndim == 3 else embeds

    model.get_input_embeddings().register_forward_hook(add)


class TaskBatches:
    """The training batches of a task, a pure function of (seed, step, rank, micro-batch).

    Args:
        recipe: its seed and the size of its batches.
        task: whose examples they are.
    """

    def __init__(self, recipe, task):
        self.seed, self.batch_size, self.task = recipe.seed, recipe.batch_size, task
        self.length_at = recipe.sequence_length_at if recipe.context_schedule else lambda step: None
        self.skipping = Skipping(recipe) if recipe.position_skip else None

    def described(self, num_tokens):
        """What is trained on, for the terminal."""
        return (
            f"The task {self.task.name}: examples of {self.task.length} tokens, "
            f"{self.task.test_examples} in each of {len(self.task.tests())} tests; "
            f"{num_tokens:,} tokens to train"
        )

    def position(self, step):
        """Where the examples of a step are: their numbers among those of all steps."""
        return {"samples": [step * self.batch_size, (step + 1) * self.batch_size - 1]}

    def batch(self, step, rank, micro, num_processes, size):
        """One process's micro-batch: input_ids [size, T] or [size, T, 2], and shift_labels.

        With `position_skip` position_ids too.
        """
        first = (micro * num_processes + rank) * size
        batch = as_inputs(self.task.batch(self.seed, step, first, size, self.length_at(step)))
        if self.skipping:
            plain, before = torch.arange(self.task.length), step * self.batch_size + first
            rows = [self.skipping.positions(plain, before + row) for row in range(size)]
            batch["position_ids"] = torch.stack(rows)
        return batch

    def save(self, folder, step):
        """Nothing: what is read follows from the step."""

    def restore(self, folder):
        """Nothing, too."""


def own_test_batches(accelerator, model, task, name, size):
    """This process's part of a test, on its device. All processes get the same number of batches.

    In the last round, those for which nothing is left get one without targets, to be there where
    weights are gathered from all.
    """
    share = share_of(accelerator, model)
    firsts = range(0, task.test_examples, size)
    rounds = -(-len(firsts) // share.world)
    for index in range(share.rank, rounds * share.world, share.world):
        first = firsts[min(index, len(firsts) - 1)]
        batch = task.test_batch(name, first, min(size, task.test_examples - first))
        if index >= len(firsts):
            batch["shift_labels"].fill_(UNSCORED)
        batch = share.cut(as_inputs(batch))
        yield {key: x.to(accelerator.device) for key, x in batch.items()}


@torch.no_grad()
def accuracy_figures(accelerator, model, task, recipe):
    """The share of targets that are the likeliest token, of the trained setting and of each test.

    Returns:
        "accuracy" and "nats" per target of the trained setting, "accuracy/<test>" of the others.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    tests, sums = task.tests(), []
    for name, settings in tests.items():
        # About as many tokens at once.
        size = max(1, recipe.eval_batch_size * task.length // task.length_of(settings))
        right_count_nats = torch.zeros(3, device=accelerator.device)
        for batch in own_test_batches(accelerator, model, task, name, size):
            targets_BT = batch.pop("shift_labels")
            logits = model(**batch, use_cache=False).logits.float()
            scored_BT = targets_BT != UNSCORED
            right_count_nats += torch.stack(
                [
                    (logits.argmax(-1) == targets_BT).sum(),
                    scored_BT.sum(),
                    cross_entropy(logits.mT, targets_BT, reduction="sum"),
                ]
            )
        sums.append(right_count_nats)
    model.train()
    right, count, nats = accelerator.reduce(torch.stack(sums), "sum").T
    accuracies = dict(zip(tests, (right / count).tolist()))
    figures = {"accuracy": accuracies.pop(TRAINED), "nats": (nats / count)[0].item()}
    return figures | {f"accuracy/{name}": value for name, value in accuracies.items()}


def task_report(run):
    """What `held_out_report` gives, of a run with a task."""
    measured = run.accelerator, run.model, run.corpus.task, run.recipe
    figures, average = accuracy_figures(*measured), ""
    others = [
        f"{name.partition('/')[2]} {value:.4f}" for name, value in figures.items() if "/" in name
    ]
    if run.average.decay:
        with run.average.in_place():
            of_average = accuracy_figures(*measured)
        figures |= {f"ema_{name}": value for name, value in of_average.items()}
        average = f", average {figures['ema_accuracy']:.4f}"
    said = f" ({', '.join(others)})" if others else ""
    return figures, [f"step {run.step}: accuracy {figures['accuracy']:.4f}{average}{said}"]
