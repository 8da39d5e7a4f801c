"""State tracking: the product of all elements of a group so far, at every position.

Merrill, Petty and Sabharwal 2024, "The Illusion of State in State-Space Models",
https://arxiv.org/abs/2404.08819: parity is what the simplest of them asks, S5 what a fixed number
of parallel layers cannot do at any length.
"""

import functools
import itertools
from dataclasses import dataclass, field

import numpy as np

from .definition import Task, below, check_positive


@dataclass(frozen=True)
class Products(Task):
    """Random elements; the target at each is the product up to it. Ids of both are the same.

    Settings:
        example_length: tokens of an example of training.
        test_lengths: of further tests, "length_<length>".
    """

    example_length: int = 32
    test_lengths: list[int] = field(default_factory=lambda: [64, 128])

    def check(self):
        """There are elements."""
        check_positive(self, "example_length", "test_lengths")

    def product(self):
        """The table of the group: [element after, element before] -> element, 0 is the unit."""
        raise NotImplementedError

    @property
    def vocab_size(self):
        """The elements."""
        return len(self.product())

    @property
    def trained(self):
        """The length of training."""
        return {"length": self.example_length}

    def more_tests(self):
        """Other lengths."""
        return {f"length_{length}": {"length": length} for length in self.test_lengths}

    def length_of(self, settings):
        """As it is set."""
        return settings["length"]

    def num_words(self, settings):
        """An element each."""
        return settings["length"]

    def make(self, words_BN, settings):
        """Elements and their products."""
        table = self.product()
        ids_BT = below(words_BN[:, : settings["length"]], len(table))
        target_BT = ids_BT.copy()
        for place in range(1, ids_BT.shape[1]):
            target_BT[:, place] = table[ids_BT[:, place], target_BT[:, place - 1]]
        return {"input_ids": ids_BT, "shift_labels": target_BT}


@dataclass(frozen=True)
class Parity(Products):
    """Whether the ones so far are odd in number."""

    name = "parity"

    def product(self):
        """Addition modulo 2."""
        return np.array([[0, 1], [1, 0]])


@dataclass(frozen=True)
class S5(Products):
    """Permutations of five things, each done after those before it."""

    name = "s5"

    def product(self):
        """Composition, permutations in their order as words."""
        return _compositions()


@functools.cache
def _compositions():
    elements = list(itertools.permutations(range(5)))
    number = {element: index for index, element in enumerate(elements)}
    return np.array(
        [[number[tuple(after[x] for x in before)] for before in elements] for after in elements]
    )
