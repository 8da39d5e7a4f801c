"""Associative recall: which value came with this key?"""

from dataclasses import dataclass, field

import numpy as np

from .definition import UNSCORED, Task, below, check_positive, distinct


@dataclass(frozen=True)
class Recall(Task):
    """Recall in which a pair is one token, so that a single layer can do it.

    Positions 1 to P hold a key and its value each, as two ids whose embeddings are summed. Then all
    P keys are asked for in another order, each beside the id 0, and the target is its value there.
    So there is nothing to learn but to store and to find, and a state too small for P pairs shows.

    Settings:
        keys, values: how many there are. Those of an example are all different.
        pairs: P of an example of training.
        test_pairs: P of further tests, "pairs_<P>".
        control_pairs: P of one more, an easy one: whoever fails it has not learnt the task,
            whatever the size of its state. 0: none.
    """

    name = "recall"
    keys: int = 64
    values: int = 64
    pairs: int = 16
    test_pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 24, 32])
    control_pairs: int = 8

    def check(self):
        """There are so many keys and values."""
        check_positive(self, "pairs", "test_pairs", *["control_pairs"] * bool(self.control_pairs))
        most = max(self.pairs, *self.test_pairs, self.control_pairs)
        if most > min(self.keys, self.values):
            raise ValueError(
                "pairs, test_pairs and control_pairs are at most the keys and the values, "
                f"{self.keys} and {self.values}, got {most}."
            )

    @property
    def vocab_size(self):
        """What stands beside a key that is asked for, the keys, the values."""
        return 1 + self.keys + self.values

    @property
    def trained(self):
        """As many pairs as in training."""
        return {"pairs": self.pairs}

    def more_tests(self):
        """Fewer pairs and more."""
        numbers = {*self.test_pairs, self.control_pairs} - {0}
        return {f"pairs_{pairs}": {"pairs": pairs} for pairs in sorted(numbers)}

    def length_of(self, settings):
        """Each pair, and each key again."""
        return 2 * settings["pairs"]

    def num_words(self, settings):
        """For keys, values and the order in which they are asked for."""
        return 3 * settings["pairs"]

    def make(self, words_BN, settings):
        """Two ids at each position."""
        pairs = settings["pairs"]
        words_BP, words_BQ, words_BR = np.split(words_BN[:, : 3 * pairs], 3, axis=1)
        key_BP = 1 + distinct(words_BP, self.keys)
        value_BP = 1 + self.keys + distinct(words_BQ, self.values)
        order_BP = distinct(words_BR, pairs)
        ids_BT2 = np.zeros((len(words_BN), 2 * pairs, 2), np.int64)
        ids_BT2[:, :pairs, 0], ids_BT2[:, :pairs, 1] = key_BP, value_BP
        ids_BT2[:, pairs:, 0] = np.take_along_axis(key_BP, order_BP, 1)
        target_BT = np.full(ids_BT2.shape[:2], UNSCORED)
        target_BT[:, pairs:] = np.take_along_axis(value_BP, order_BP, 1)
        return {"stacked_ids": ids_BT2, "shift_labels": target_BT}


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall as Arora et al. 2023 have it, https://arxiv.org/abs/2312.04927.

    Keys and values in turn; then each key once more, at a distance whose logarithm is spread
    evenly, among random ids. The target at a key that comes again is its value.

    Settings, which default to the first of the paper's (64, 4), (128, 8), (256, 16), (512, 64):
        vocabulary: ids. The lower half but 0 are keys, the upper half values.
        example_length: tokens of an example of training.
        pairs: that it has.
        power: of the distances: n is as likely as n^(power - 1).
        test_settings: [length, pairs] of further tests, "length_<length>_pairs_<pairs>".
    """

    name = "mqar"
    vocabulary: int = 8192
    example_length: int = 64
    pairs: int = 4
    power: float = 0.01
    test_settings: list[list[int]] = field(default_factory=list)

    def check(self):
        """Keys fit into the vocabulary, and each one twice into an example."""
        check_positive(self, "example_length", "pairs", "test_settings")
        if any(len(setting) != 2 for setting in self.test_settings):
            raise ValueError(f"test_settings are [length, pairs], got {self.test_settings}.")
        for length, pairs in [(self.example_length, self.pairs), *self.test_settings]:
            if 4 * pairs > length or pairs > self.vocabulary // 2 - 1:
                raise ValueError(
                    f"an example has at least 4 tokens for each pair, and a vocabulary of "
                    f"{self.vocabulary} has {max(0, self.vocabulary // 2 - 1)} keys, got {pairs} "
                    f"pairs in {length} tokens; take fewer pairs."
                )

    @property
    def vocab_size(self):
        """As it is set."""
        return self.vocabulary

    @property
    def trained(self):
        """Length and pairs of training."""
        return {"length": self.example_length, "pairs": self.pairs}

    def more_tests(self):
        """Other lengths and pairs."""
        return {
            f"length_{length}_pairs_{pairs}": {"length": length, "pairs": pairs}
            for length, pairs in self.test_settings
        }

    def length_of(self, settings):
        """As it is set."""
        return settings["length"]

    def num_words(self, settings):
        """For keys, values, the places where keys may come again, and the ids between."""
        places = (settings["length"] - 2 * settings["pairs"]) // 2
        return 2 * settings["pairs"] + places + settings["length"]

    def make(self, words_BN, settings):
        """Pairs, then keys among random ids."""
        length, pairs = settings["length"], settings["pairs"]
        places, half = (length - 2 * pairs) // 2, self.vocabulary // 2
        sizes = np.cumsum([pairs, pairs, places])
        words_BP, words_BQ, words_BS, words_BT, _ = np.split(
            words_BN, [*sizes, sizes[-1] + length], axis=1
        )
        key_BP = 1 + distinct(words_BP, half - 1)
        value_BP = half + distinct(words_BQ, self.vocabulary - half)
        # Who comes first, of places that come at these rates, is drawn by these weights.
        rate_S = np.arange(1, places + 1) ** (self.power - 1.0)
        uniform_BS = (1 + (words_BS >> np.uint64(11))) * 2.0**-53
        place_BP = np.argsort(-np.log(uniform_BS) / rate_S, axis=1)[:, :pairs]
        ids_BT = below(words_BT, self.vocabulary)
        ids_BT[:, 0 : 2 * pairs : 2], ids_BT[:, 1 : 2 * pairs : 2] = key_BP, value_BP
        target_BT = np.full(ids_BT.shape, UNSCORED)
        np.put_along_axis(ids_BT, 2 * (pairs + place_BP), key_BP, 1)
        np.put_along_axis(target_BT, 2 * (pairs + place_BP), value_BP, 1)
        return {"input_ids": ids_BT, "shift_labels": target_BT}
