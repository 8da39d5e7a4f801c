"""Passkey retrieval: digits that stand somewhere in filler, and are asked for at its end."""

from dataclasses import dataclass, field

import numpy as np

from .definition import UNSCORED, Task, below, check_positive

START, KEY, ASK, FIRST_DIGIT = 0, 1, 2, 3


@dataclass(frozen=True)
class KeyInFiller(Task):
    """The task of Mohtashami and Jaggi 2023 (https://arxiv.org/abs/2305.16300) in single tokens.

    Filler that repeats itself, in it a key (a mark and its digits), at the end a question (another
    mark) and the digits again, which are scored. Digits of different places are different tokens:
    to tell places apart first takes a small model longer than all the rest. A subclass says where
    the key lies.

    Settings:
        digits: of a key.
        filler: tokens after which the filler begins again.
    """

    digits: int = 5
    filler: int = 19

    def places(self, words_BN, settings):
        """Where the key's mark stands in each example; the first `digits` + 1 words are used."""
        raise NotImplementedError

    @property
    def closest(self):
        """Tokens from the key's mark to the question's, at least."""
        return 1 + self.digits

    @property
    def vocab_size(self):
        """Marks, digits, filler."""
        return FIRST_DIGIT + 10 * self.digits + self.filler

    def asked(self, settings):
        """Where the question's mark stands: its digits follow, the last of them a target alone."""
        return self.length_of(settings) - self.digits

    def num_words(self, settings):
        """For the digits, where the key lies, where the filler begins."""
        return self.digits + 2

    def make(self, words_BN, settings):
        """Filler with a key and a question."""
        length, asked, digits = self.length_of(settings), self.asked(settings), self.digits
        row_B1 = np.arange(len(words_BN))[:, None]
        digit_BN = FIRST_DIGIT + 10 * np.arange(digits) + below(words_BN[:, :digits], 10)
        place_B1 = self.places(words_BN, settings)[:, None]
        phase_B1 = below(words_BN[:, digits + 1 : digits + 2], self.filler)
        ids_BT = FIRST_DIGIT + 10 * digits + (np.arange(length) + phase_B1) % self.filler
        ids_BT[:, 0], ids_BT[:, asked], ids_BT[:, asked + 1 :] = START, ASK, digit_BN[:, :-1]
        key_BN = np.insert(digit_BN, 0, KEY, axis=1)
        ids_BT[row_B1, place_B1 + np.arange(1 + digits)] = key_BN
        target_BT = np.full_like(ids_BT, UNSCORED)
        target_BT[:, asked:] = digit_BN
        return {"input_ids": ids_BT, "shift_labels": target_BT}


@dataclass(frozen=True)
class Passkey(KeyInFiller):
    """A key that lies anywhere in training, and so many tokens before the question in tests.

    Settings:
        example_length: tokens of an example of training.
        test_distances: from the key's mark to the question's, in tokens, of further tests,
            "distance_<distance>". Their examples are longer than those of training where they must.
    """

    name = "passkey"
    example_length: int = 128
    test_distances: list[int] = field(default_factory=lambda: [16, 64, 112, 256, 512])

    def check(self):
        """There is room for key and question."""
        check_positive(self, "digits", "filler")
        shortest = self.length_of({"distance": self.closest})
        if self.example_length < shortest:
            raise ValueError(
                f"example_length is at least {shortest} with {self.digits} digits, got "
                f"{self.example_length}."
            )
        if min([self.closest, *self.test_distances]) < self.closest:
            raise ValueError(
                f"test_distances are at least {self.closest}, the mark and {self.digits} digits, "
                f"got {self.test_distances}."
            )

    @property
    def trained(self):
        """The key anywhere."""
        return {"length": self.example_length}

    def of_length(self, length):
        """The key anywhere in so many tokens."""
        if length < (shortest := self.length_of({"distance": self.closest})):
            raise ValueError(
                f"examples of the task {self.name} have at least {shortest} tokens, got {length}."
            )
        return {"length": length}

    def more_tests(self):
        """The key at some distance."""
        return {
            f"distance_{distance}": {
                "length": max(self.example_length, self.length_of({"distance": distance})),
                "distance": distance,
            }
            for distance in self.test_distances
        }

    def length_of(self, settings):
        """As it is set, or the shortest with a distance."""
        # The start, and the digits of the question but the last, which is a target alone.
        return settings.get("length") or 1 + settings["distance"] + self.digits

    def places(self, words_BN, settings):
        """As far before the question as it is set, or anywhere after the start."""
        asked = self.asked(settings)
        farthest = asked - 1  # the key right after the start
        distance_B = self.closest + below(words_BN[:, self.digits], farthest - self.closest + 1)
        distance_B[:] = settings.get("distance", distance_B)
        return asked - distance_B
