"""What all tasks share: settings, and examples that are functions of a seed and their number.

An example is made of random words of its own: so many words of 64 bits, at a place in the stream of
a counter-based generator (Philox) that follows from the example's number. So a batch is made at
once, and is the same however many processes share it and wherever a run begins again.
"""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

FORMAT = 1  # of the examples; another number is another task
UNSCORED = -100  # a target that no loss and no accuracy counts
TRAINED = "trained"  # the test with examples as in training
WORDS = 4  # that Philox makes at a time


@dataclass(frozen=True)
class Task:
    """A family of examples with its settings; a subclass says what an example is.

    Settings of an example, such as how many pairs it has, are a dictionary: those of training in
    `trained`, those of each test in `tests()`.

    Attributes:
        test_examples: examples of each test.
    """

    name: ClassVar[str]
    test_examples: int = 256

    def __post_init__(self):
        """Checks what the settings mean together.

        Raises:
            ValueError: settings of which there is no example.
        """
        if self.test_examples < 1:
            raise ValueError(f"test_examples is at least 1, got {self.test_examples}.")
        self.check()

    @classmethod
    def kinds(cls):
        """The type of each setting by its name."""
        hints = typing.get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    @property
    def vocab_size(self):
        """How many token ids there are."""
        raise NotImplementedError

    @property
    def trained(self):
        """The settings of an example of training."""
        raise NotImplementedError

    def more_tests(self):
        """Name -> settings of the tests beside that of the trained setting."""
        raise NotImplementedError

    def check(self):
        """Raises a ValueError if the settings do not fit together."""

    def length_of(self, settings):
        """Tokens of an example."""
        raise NotImplementedError

    def num_words(self, settings):
        """How many random words an example is made of."""
        raise NotImplementedError

    def make(self, words_BN, settings):
        """Examples of random words.

        Args:
            words_BN: 64 random bits each, uint64.
            settings: of the examples.

        Returns:
            "input_ids" [B, T] or "stacked_ids" [B, T, 2], and "shift_labels" [B, T], int64.
        """
        raise NotImplementedError

    @property
    def length(self):
        """Tokens of an example of training."""
        return self.length_of(self.trained)

    def tests(self):
        """Name -> settings of each test, that of the trained setting first."""
        return {TRAINED: self.trained, **self.more_tests()}

    def table(self):
        """All settings, as `load` takes them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @property
    def sha256(self):
        """What identifies the task."""
        return _sha256([FORMAT, self.table()]).hexdigest()

    def of_length(self, length):
        """The settings of examples of training with other so many tokens, for a curriculum.

        Raises:
            ValueError: there are none.
        """
        if length != self.length:
            raise ValueError(
                f"examples of the task {self.name} have {self.length} tokens, got {length}; leave "
                "context_schedule out."
            )
        return self.trained

    def batch(self, seed, step, first, size, length=None):
        """Examples `first` to `first + size` of a step of training.

        Args:
            seed, step, first, size: which.
            length: tokens of each, as of `of_length`; None: as the settings say.

        Returns:
            Tensors: "input_ids" [B, T], or "stacked_ids" [B, T, 2], two ids whose embeddings are
            summed; and "shift_labels" [B, T], the targets, `UNSCORED` where there is none.
        """
        settings = self.trained if length is None else self.of_length(length)
        return self.examples(["train", seed, step], settings, first, size)

    def test_batch(self, name, first, size):
        """The same of a test, of whose examples none is one of training, whatever the seed."""
        return self.examples(["test", name], self.tests()[name], first, size)

    def examples(self, whose, settings, first, size):
        """Examples `first` to `first + size` of some settings, others for each list `whose`."""
        # The tests that there are change neither those of training nor each other's.
        key = _sha256([FORMAT, self.name, settings, *whose]).digest()[:16]
        count = -(-self.num_words(settings) // WORDS)  # what one number of the counter makes
        philox = np.random.Philox(key=int.from_bytes(key, "little"), counter=first * count)
        words_BN = philox.random_raw(size * count * WORDS).reshape(size, count * WORDS)
        made = self.make(words_BN, settings)
        return {name: torch.from_numpy(array) for name, array in made.items()}


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode())


def below(words, bound):
    """Numbers from 0 to below a bound of at most 2^32, each as likely as the others."""
    return ((words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def distinct(words_BN, bound):
    """N different numbers below a bound in each row, every order as likely as the others."""
    rows, count = words_BN.shape
    # The first steps of a shuffle.
    pool_BV, row_B = np.tile(np.arange(bound), (rows, 1)), np.arange(rows)
    for place in range(count):
        other_B = place + below(words_BN[:, place], bound - place)
        taken_B = pool_BV[row_B, other_B]
        pool_BV[row_B, other_B] = pool_BV[:, place]
        pool_BV[:, place] = taken_B
    return pool_BV[:, :count]


def check_positive(task, *names):
    """Raises a ValueError for a setting, or a number in one that is a list, which is below 1."""
    for name in names:
        value = getattr(task, name)
        if np.any(np.array(value if isinstance(value, list) else [value]) < 1):
            raise ValueError(f"{name} is at least 1, got {value}.")
