"""What precision a model really computes in, measured; how far equal results may then differ.

A model given in float64 may still round to float32 inside, as norms and recurrences often do, or
refuse float64 altogether, as the grouped product of experts does. Two ways of running it then
differ by roundings of float32, and that is no fault. What is rounded is seen by watching every
operation on something that depends on the weights; how much a rounding of that size moves the
result is seen by moving the weights by their last bit.
"""

import functools
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from . import ways
from .compare import NAMES, relative
from .report import NotApplicable, first_line
from .subject import generator

# As for models of the zoo in float64 and in float32. For 16 bits a few roundings of the largest.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Half a last bit, relative.
LAST_BIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11}
LAST_BIT[torch.bfloat16] = 2**-8


class _SeeRoundings(TorchFunctionMode):
    """Notes the coarsest type that anything dependent on the weights is brought to."""

    def __init__(self, dtype):
        super().__init__()
        self.coarsest = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(x, torch.Tensor) and x.requires_grad and x.is_floating_point():
                if LAST_BIT.get(x.dtype, 0) > LAST_BIT[self.coarsest]:
                    self.coarsest = x.dtype
        return output


@dataclass
class Precision:
    """What a model is run in, and what it computes in.

    Attributes:
        dtype: of the weights in the checks.
        computes_in: the coarsest type that something dependent on the weights is rounded to.
        moved: how far the logits move, relative to the largest, when every weight moves by
            half a last bit of `computes_in`.
        reason: why it is not run in float64; "" if it is.
    """

    dtype: torch.dtype
    computes_in: torch.dtype
    moved: float
    reason: str = ""

    def describe(self):
        """In a line."""
        text = f"run in {NAMES[self.dtype]}"
        text += f" ({self.reason})" if self.reason else ""
        if self.computes_in != self.dtype:
            text += f", rounds to {NAMES[self.computes_in]} inside"
        return (
            f"{text}: a last bit of the weights moves the logits by {self.moved:.1e}, "
            f"so equal is within {BOUNDS[self.computes_in]:g} or four times what that bit does"
        )

    def as_dict(self):
        """For JSON."""
        return {
            "run_in": NAMES[self.dtype],
            "computes_in": NAMES[self.computes_in],
            "moved_by_a_last_bit": self.moved,
            "bound": BOUNDS[self.computes_in],
            "reason": self.reason,
        }


def measure(subject):
    """Measures a `Subject`'s precision.

    Raises:
        NotApplicable: it does not run at all; the message says what it raised.
    """
    reasons = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = subject.model(dtype)
        try:
            expected, coarsest = _watched(subject, model)
        except NotApplicable:
            raise
        except Exception as error:
            # A model of somebody else may raise anything.
            reasons[dtype] = first_line(error)
            continue
        reason = f"no {NAMES[torch.float64]}: {reasons[torch.float64]}" if reasons else ""
        moved = [
            relative(_logits(subject, x), expected)
            for x in shaken(subject, dtype, LAST_BIT[coarsest])
        ]
        return Precision(dtype, coarsest, max(moved), reason)
    raise NotApplicable(f"it does not run: {next(iter(reasons.values()))}")


def _watched(subject, model):
    see = _SeeRoundings(next(model.parameters()).dtype)
    for parameter in model.parameters():
        parameter.requires_grad_()
    with see:
        logits = ways.whole(subject, model, _ids(subject))
    if hasattr(model, "generate"):
        # One token at a time may be another operation, without float64 where the whole has it.
        _decode(subject, model)
    return logits.detach(), see.coarsest


def _decode(subject, model):
    try:
        with torch.no_grad():
            ways.dictated(subject, model, _ids(subject)[:1, :4], 2)
    except RuntimeError as error:
        if any(word in str(error) for word in ("Double", "double", "Float64", "float64")):
            raise
        # Anything else is for the checks to find.


def _logits(subject, model):
    with torch.no_grad():
        return ways.whole(subject, model, _ids(subject))


def _ids(subject):
    longest = getattr(subject.config, "max_position_embeddings", None) or 32
    return subject.ids(2, min(32, longest))


def shaken(subject, dtype, size, number=2):
    """Models whose weights each differ from the subject's by about this much, relatively."""
    for seed in range(number):
        model, noise = subject.model(dtype), generator(seed)
        with torch.no_grad():
            for weight in model.parameters():
                random = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
                weight *= (1 + 2 * size * random).to(weight.dtype)
        yield model


class Bounds:
    """Bounds for one subject in one type: the type's, or what moving the weights' last bit does.

    Args:
        subject: the `Subject`.
        dtype: of the weights.
        computes_in: the type to which something is rounded inside.
    """

    def __init__(self, subject, dtype, computes_in):
        self.subject, self.dtype = subject, dtype
        self.last_bit = LAST_BIT[computes_in]
        self.of_type = BOUNDS[computes_in]

    @functools.cached_property
    def _shaken(self):
        return list(shaken(self.subject, self.dtype, self.last_bit))

    def of(self, figure, distance, results, model):
        """The bound of a figure, and why it is another than the type's.

        Two results differ by rounding if moving every weight by its last bit moves them as much,
        or if it makes another difference of them: a fault stays what it is when a last bit moves.

        Args:
            figure: what was measured; a figure within the type's bound needs no other.
            distance: of two results.
            results: model -> the two results.
            model: the unmoved one.
        """
        # Rounding does not come to a hundred times what the type's bound allows for.
        if figure <= self.of_type or figure > 100 * self.of_type:
            return self.of_type, ""
        found, expected = results(model)
        moved, directions = 0.0, []
        for other in self._shaken:
            others = results(other)
            moved = max(moved, distance(others[1], expected), distance(others[0], found))
            directions.append(_cosine((found, expected), others))
        bound = max(self.of_type, 4 * moved)
        if figure > bound and max(map(abs, directions)) < 0.5:
            return figure, "rounding: another last bit of the weights makes another difference"
        return bound, "four times what a last bit of the weights moves" if figure <= bound else ""


def _cosine(one, other):
    """Of the differences between two pairs of results."""
    differences = [_flat(found) - _flat(expected) for found, expected in (one, other)]
    return torch.nn.functional.cosine_similarity(*differences, dim=0).item()


def _flat(result):
    parts = result.values() if isinstance(result, dict) else result
    parts = [result] if isinstance(result, torch.Tensor) else parts
    return torch.cat([x.detach().double().flatten() for x in parts])
