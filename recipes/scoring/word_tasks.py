"""Recall in words, for models that were trained on text: generated here, alike for every tokenizer.

Each example is a text and choices of how it goes on; the answer is the likeliest one, by the sum of
its tokens' log-probabilities, as lm-evaluation-harness has it. So a guess is right once in as many
times as there are choices.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pretraining.recipe import UsageError, nearest

from .measures import nats_of_ends

EXAMPLES = 100
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kim Leo Mia Ned Ola Pam Quin Rex Sue Tom Una Vic "
    "Wes Xena Yves Zoe Amos Bea Carl Dora Emil Fay"
).split()
THINGS = (
    "apples bread cheese dates eggs figs grapes honey ink jam kale lemons milk nuts oats pears "
    "quinces rice salt tea urns vases wine yams zinc beans corn dill fish gold hats iron"
).split()
PASSKEY_BYTES = (256, 1024, 4096)
RECALL_PAIRS = (4, 8, 16, 32)


@dataclass
class Example:
    """A text, how it may go on, and which of these is right."""

    text: str
    choices: list[str]
    answer: int


def passkey(num_bytes, number):
    """A number that is said once in filler, and asked for at the end; ten numbers to choose from.

    Args:
        num_bytes: of the text, to a sentence. Where the number is said is drawn evenly.
        number: of the example.
    """
    # numpy promises that RandomState's numbers stay the same from version to version.
    draw = np.random.RandomState([0, num_bytes, number])
    keys = 10_000 + 9_000 * draw.permutation(10) + draw.randint(9_000, size=10)
    answer = draw.randint(10)
    said = f"The pass key is {keys[answer]}. Remember it. "
    ask = "What is the pass key? The pass key is"
    room = max(0, num_bytes - len(said) - len(ask))
    filler = (FILLER * (room // len(FILLER) + 1))[:room]
    # Neither begins nor ends within a sentence.
    ends = [0, *(i + 2 for i in range(room) if filler.startswith(". ", i))]
    place = ends[draw.randint(len(ends))]
    text = filler[:place] + said + filler[place : ends[-1]] + ask
    return Example(text, [str(key) for key in keys], answer)


def recall(num_pairs, number):
    """Who likes what, said once of each of so many, and asked for one; four things to choose from.

    All four are in the text, so that having seen them is not enough.
    """
    draw = np.random.RandomState([1, num_pairs, number])
    names, things = (draw.permutation(words)[:num_pairs].tolist() for words in (NAMES, THINGS))
    choices = draw.permutation(things)[:4].tolist()
    answer = draw.randint(4)
    asked = things.index(choices[answer])
    said = " ".join(f"{name} likes {thing}." for name, thing in zip(names, things))
    return Example(f"{said} {names[asked]} likes", choices, answer)


TASKS = {
    **{f"zoo_passkey_{size}": (passkey, size) for size in PASSKEY_BYTES},
    **{f"zoo_recall_{pairs}": (recall, pairs) for pairs in RECALL_PAIRS},
}


def chosen(names):
    """The tasks that names stand for: a task, or the beginning of several such as zoo_recall.

    Raises:
        UsageError: a name that is none.
    """
    found = []
    for name in names:
        own = [task for task in TASKS if task == name or task.startswith(f"{name}_")]
        if not own:
            raise UsageError(f"no task {name!r}: {nearest(name, TASKS)}")
        found += [task for task in own if task not in found]
    return found


def examples(name):
    """The examples of a task, the same wherever and whenever they are made."""
    make, size = TASKS[name]
    return [make(size, number) for number in range(EXAMPLES)]


def accuracy(subject, name, at_once):
    """The share of a task's examples in which the right choice is the likeliest.

    Args:
        subject: the model and its tokenizer.
        name: of the task.
        at_once: tokens in a batch.

    Raises:
        UsageError: an example has more tokens than the model has positions.
    """
    found, windows = examples(name), []
    for example in found:
        # With what the tokenizer puts before a text by itself, and nothing else.
        before = len(subject.tokenizer(example.text)["input_ids"])
        for choice in example.choices:
            ids = subject.tokenizer(f"{example.text} {choice}")["input_ids"]
            windows.append((torch.tensor(ids), len(ids) - before))
    longest, limit = max(len(ids) for ids, _ in windows) - 1, subject.num_positions
    if limit and longest > limit:
        raise UsageError(
            f"{name} has texts of {longest} tokens, and the model {limit} positions; leave it out."
        )
    nats, right, first = nats_of_ends(subject.model, windows, at_once), 0, 0
    for example in found:
        own = nats[first : first + len(example.choices)]
        right += own.index(min(own)) == example.answer
        first += len(own)
    return right / len(found)
