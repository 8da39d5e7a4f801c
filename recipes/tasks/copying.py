"""To say again: a whole string, or what followed a mark the last time."""

from dataclasses import dataclass, field

import numpy as np

from .definition import UNSCORED, Task, below, check_positive


@dataclass(frozen=True)
class Copy(Task):
    """A string of random symbols, a mark, and the string again, which is scored.

    Settings:
        symbols: how many there are.
        tokens: of the string in training.
        test_tokens: of the strings of further tests, "tokens_<tokens>".
    """

    name = "copy"
    symbols: int = 64
    tokens: int = 16
    test_tokens: list[int] = field(default_factory=lambda: [8, 32])

    def check(self):
        """Something is copied."""
        check_positive(self, "symbols", "tokens", "test_tokens")

    @property
    def vocab_size(self):
        """The mark and the symbols."""
        return 1 + self.symbols

    @property
    def trained(self):
        """The string of training."""
        return {"tokens": self.tokens}

    def more_tests(self):
        """Other strings."""
        return {f"tokens_{tokens}": {"tokens": tokens} for tokens in self.test_tokens}

    def length_of(self, settings):
        """The string, the mark, and the string but for its last token, which is a target alone."""
        return 2 * settings["tokens"]

    def num_words(self, settings):
        """A symbol each."""
        return settings["tokens"]

    def make(self, words_BN, settings):
        """The string twice."""
        string_BN = 1 + below(words_BN[:, : settings["tokens"]], self.symbols)
        mark_B1 = np.zeros((len(words_BN), 1), np.int64)
        ids_BT = np.concatenate([string_BN, mark_B1, string_BN[:, :-1]], axis=1)
        unscored_BN = np.full_like(string_BN, UNSCORED)
        return {
            "input_ids": ids_BT,
            "shift_labels": np.concatenate([unscored_BN, string_BN], axis=1),
        }


@dataclass(frozen=True)
class Induction(Task):
    """Random symbols with a mark somewhere and at the end: what followed it is the target.

    The induction heads of Olsson et al. 2022 (https://arxiv.org/abs/2209.11895), as Dao et al. 2022
    test them (https://arxiv.org/abs/2212.14052).

    Settings:
        symbols: how many there are.
        example_length: tokens of an example of training.
        test_lengths: of further tests, "length_<length>".
        test_examples: of each test, which have one target each.
    """

    name = "induction"
    symbols: int = 16
    example_length: int = 64
    test_lengths: list[int] = field(default_factory=lambda: [128, 256])
    test_examples: int = 1024

    def check(self):
        """There is room for two marks and what follows the first."""
        check_positive(self, "symbols")
        if min([self.example_length, *self.test_lengths]) < 3:
            raise ValueError("examples have at least 3 tokens, a mark, a symbol and the mark.")

    @property
    def vocab_size(self):
        """The mark and the symbols."""
        return 1 + self.symbols

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
        """For the symbols, and for the place of the mark."""
        return settings["length"] + 1

    def make(self, words_BN, settings):
        """Symbols and two marks."""
        length, row_B = settings["length"], np.arange(len(words_BN))
        ids_BT = 1 + below(words_BN[:, :length], self.symbols)
        place_B = below(words_BN[:, length], length - 2)
        ids_BT[row_B, place_B] = ids_BT[:, -1] = 0
        target_BT = np.full_like(ids_BT, UNSCORED)
        target_BT[:, -1] = ids_BT[row_B, place_B + 1]
        return {"input_ids": ids_BT, "shift_labels": target_BT}
