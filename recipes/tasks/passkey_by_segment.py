"""Passkey retrieval by segments: how many segments back a key is found again."""

from dataclasses import dataclass, field

import numpy as np

from .definition import below, check_positive
from .passkey import KeyInFiller


@dataclass(frozen=True)
class PasskeyBySegment(KeyInFiller):
    """A key that lies whole in one segment, in training in any of them, each as likely.

    For models that read a document in segments and remember earlier ones: what lies in the segment
    of the question needs no memory, and what lies across a border none can be blamed for.

    Settings:
        segment_length: tokens of a segment.
        segments: of an example of training.
        test_back: segments from the key's to the question's of further tests, "back_<segments>".
            Their examples are longer than those of training where they must.
    """

    name = "passkey_by_segment"
    segment_length: int = 16
    segments: int = 8
    test_back: list[int] = field(default_factory=lambda: [0, 1, 7, 15])

    def check(self):
        """There is room for key and question in one segment."""
        check_positive(self, "digits", "filler", "segments")
        # The start, the key, and the question without its last digit.
        shortest = 1 + self.closest + self.digits
        if self.segment_length < shortest:
            raise ValueError(
                f"segment_length is at least {shortest} with {self.digits} digits, so that key and "
                f"question fit into one segment, got {self.segment_length}."
            )
        if min(self.test_back, default=0) < 0:
            raise ValueError(
                f"test_back are segments from the key's to the question's, 0 or more, got "
                f"{self.test_back}."
            )

    @property
    def trained(self):
        """The key in any segment."""
        return {"segments": self.segments}

    def of_length(self, length):
        """The key in any of fewer segments, or more."""
        segments, rest = divmod(length, self.segment_length)
        if rest or not segments:
            raise ValueError(
                f"examples of the task {self.name} are whole segments of {self.segment_length} "
                f"tokens, got {length}."
            )
        return {"segments": segments}

    def more_tests(self):
        """The key so many segments back."""
        return {
            f"back_{back}": {"segments": max(self.segments, back + 1), "back": back}
            for back in self.test_back
        }

    def length_of(self, settings):
        """Whole segments."""
        return settings["segments"] * self.segment_length

    def places(self, words_BN, settings):
        """Anywhere in a segment, whole and neither on the start nor on the question."""
        segments, size = settings["segments"], self.segment_length
        back_B = below(words_BN[:, self.digits], segments)
        back_B[:] = settings.get("back", back_B)
        segment_B = segments - 1 - back_B
        low_B = np.maximum(segment_B * size, 1)
        after_B = np.minimum((segment_B + 1) * size, self.asked(settings))
        # The half of the word that has not chosen the segment.
        spare_B = words_BN[:, self.digits] << np.uint64(32)
        return low_B + below(spare_B, after_B - self.closest - low_B + 1)
