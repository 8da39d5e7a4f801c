"""Positions as rotations of queries and keys (RoPE, Su et al. 2021, section 3.2).

https://arxiv.org/abs/2104.09864. `RotaryPositions` has the angles of Transformers, as transformers
describes them; other architectures have their own.
"""

import difflib
import functools
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..core.base import Constant
from ..core.length_limit import length_limit
from ..kernels.recurrence_steps import takes_plain_step

# The fields of `rope_parameters` that each rope_type has to have, and those it may have.
ROPE_FIELDS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "proportional": ((), ("factor",)),
}
ROPE_TYPES = tuple(ROPE_FIELDS)
NEEDS_LENGTH = ("yarn", "llama3", "longrope")
# Of all: "type" is the older name of rope_type.
COMMON_FIELDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rotate(x_BTHK, cos_BTHK, sin_BTHK, interleaved=False):
    """Turns pairs of channels, in float32 or better; returned in x's own dtype.

    Args:
        x_BTHK: queries or keys.
        cos_BTHK, sin_BTHK: of each pair's angle, K / 2 wide; narrower: the channels after those
            pairs stay as they are.
        interleaved: pairs (2j, 2j + 1), else (j, j + K/2).
    """
    size = 2 * cos_BTHK.shape[-1]
    if size < x_BTHK.shape[-1]:
        turned_BTHK = rotate(x_BTHK[..., :size], cos_BTHK, sin_BTHK, interleaved)
        return torch.cat([turned_BTHK, x_BTHK[..., size:]], dim=-1)
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    cos_BTHK, sin_BTHK = cos_BTHK.to(dtype), sin_BTHK.to(dtype)
    if interleaved:
        a_BTHK, b_BTHK = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a_BTHK, b_BTHK = x_BTHK.chunk(2, dim=-1)
    turned = a_BTHK * cos_BTHK - b_BTHK * sin_BTHK, b_BTHK * cos_BTHK + a_BTHK * sin_BTHK
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x_BTHK.dtype)


class StepRotation(NamedTuple):
    """A rotation made ready for a step, in which each layer turns one token of each row.

    As a pair's channels come to (a cos - b sin, b cos + a sin), the whole is x cos + y sin with y
    the partners of x, and of sin the sign that goes with each channel.

    Attributes:
        cos, sin: for each channel that is turned, [B, 1, H or 1, K].
        interleaved: as of `rotate`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @classmethod
    def of(cls, rotation, like, interleaved=False):
        """That of (cos, sin) of each pair's angle, in at least float32 and the dtype of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        cos_BTHK, sin_BTHK = (x.to(dtype) for x in rotation)
        if interleaved:
            sin_BTHK = torch.stack([-sin_BTHK, sin_BTHK], dim=-1).flatten(-2)
            return cls(cos_BTHK.repeat_interleave(2, dim=-1), sin_BTHK, True)
        both = torch.cat([cos_BTHK, cos_BTHK], dim=-1), torch.cat([-sin_BTHK, sin_BTHK], dim=-1)
        return cls(*both, False)

    @classmethod
    def if_step(cls, rotation, sequence, x_BTD, interleaved=False):
        """`of` where the pass is a plain step, else the rotation itself.

        Args:
            rotation: (cos, sin).
            sequence, x_BTD: of the pass.
            interleaved: as of `rotate`.
        """
        if takes_plain_step(sequence, x_BTD):
            return cls.of(rotation, x_BTD, interleaved)
        return rotation

    def turn(self, x_BTHK):
        """As `rotate`."""
        size, dtype = self.cos.shape[-1], x_BTHK.dtype
        if size < x_BTHK.shape[-1]:
            rest_BTHK = x_BTHK[..., size:]
            return torch.cat([self.turn(x_BTHK[..., :size]), rest_BTHK], dim=-1)
        if self.interleaved:
            partners_BTHK = x_BTHK.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partners_BTHK = x_BTHK.roll(size // 2, -1)
        return torch.addcmul(x_BTHK * self.cos, partners_BTHK, self.sin).to(dtype)

    def rows(self, places):
        """That of some of the places along its first axis."""
        return self._replace(cos=self.cos[places], sin=self.sin[places])

    def times(self, factor):
        """That turns and multiplies, by a number or a tensor [B, 1, H or 1, 1]."""
        return self._replace(cos=self.cos * factor, sin=self.sin * factor)


def turned(x_BTHK, rotation, interleaved=False):
    """`rotate` by (cos, sin) or by a `StepRotation`."""
    if isinstance(rotation, StepRotation):
        return rotation.turn(x_BTHK)
    return rotate(x_BTHK, *rotation, interleaved)


def num_rotated_channels(config):
    """How many channels of a head are turned, the first: all but for a partial_rotary_factor.

    Of type proportional that says how many of the pairs of the whole head have an angle above 0.
    """
    if config.rope_parameters.get("rope_type") == "proportional":
        return config.head_dim
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def check_rope_parameters(config):
    """Raises a ValueError if `RotaryPositions` cannot be built from a config."""
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"head_dim is even (RoPE turns pairs), got {config.head_dim}.")
    rope_type = config.rope_parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_parameters['rope_type'] is one of {', '.join(ROPE_TYPES)}, got {rope_type!r}."
        )
    _check_fields(config.rope_parameters, rope_type)
    known = length_limit(config)
    if rope_type in NEEDS_LENGTH:
        known = config.rope_parameters.get("original_max_position_embeddings")
    needs_length = rope_type in ("dynamic", *NEEDS_LENGTH)
    if needs_length and not (isinstance(known, int) and known > 0):
        raise ValueError(
            f"RoPE of type {rope_type} starts from the length the model was trained for, "
            f"got {known!r}; set max_position_embeddings."
        )
    says_factor = config.rope_parameters.get("factor") is not None
    if rope_type == "longrope" and not says_factor and length_limit(config) is None:
        raise ValueError(
            "rope_parameters of type longrope need factor, or max_position_embeddings, by which "
            "transformers divides original_max_position_embeddings; got neither."
        )
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    _check_number("partial_rotary_factor", share, 0)
    size = num_rotated_channels(config)
    if rope_type == "proportional":
        turned = int(share * config.head_dim // 2)  # as transformers counts them
        if not 1 <= turned <= config.head_dim // 2:
            raise ValueError(
                "partial_rotary_factor of type proportional turns from 1 to all "
                f"{config.head_dim // 2} pairs of a head, got {turned} from {share}."
            )
    if not 2 <= size <= config.head_dim or size % 2:
        raise ValueError(
            "partial_rotary_factor makes an even number of a head's channels, from 2 to head_dim "
            f"{config.head_dim}, got {size} from {share}."
        )
    for name in ("short_factor", "long_factor"):
        factors = config.rope_parameters.get(name)
        if name in ROPE_FIELDS[rope_type][0] and not (
            isinstance(factors, list)
            and len(factors) == size // 2
            and all(map(_is_above_0, factors))
        ):
            raise ValueError(
                f"rope_parameters['{name}'] is a list of {size // 2} numbers above 0, one for each "
                f"pair of channels, got {factors!r}."
            )


def _check_fields(parameters, rope_type):
    """Raises a ValueError for fields that are unknown, missing or out of range."""
    needed, optional = ROPE_FIELDS[rope_type]
    known = {*COMMON_FIELDS, *needed, *optional}
    if rope_type in NEEDS_LENGTH:
        known.add("original_max_position_embeddings")
    unknown = sorted(set(parameters) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out."
        raise ValueError(
            f"rope_parameters of type {rope_type} have no field {unknown[0]!r}; {remedy}"
        )
    missing = [name for name in needed if parameters.get(name) is None]
    if missing:
        raise ValueError(
            f"rope_parameters of type {rope_type} need {' and '.join(missing)}, got "
            f"{', '.join(sorted(parameters)) or 'nothing'}."
        )
    _check_number("rope_theta", parameters["rope_theta"], 0)
    if parameters.get("factor") is not None:
        _check_number("factor", parameters["factor"], 1, or_equal=True)
    names = ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
    for name in names:
        if parameters.get(name) is not None:
            _check_number(name, parameters[name], 0)
    fast, slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    if rope_type == "yarn" and fast < slow:
        raise ValueError(
            f"rope_parameters: beta_fast is at least beta_slow, got {fast} and {slow}."
        )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if rope_type == "llama3" and high <= low:
        raise ValueError(
            f"rope_parameters: high_freq_factor is above low_freq_factor, got {high} and {low}."
        )


def _check_number(name, value, least, or_equal=False):
    if _is_above_0(value) and (value > least or or_equal and value == least):
        return
    words = "at least" if or_equal else "above"
    raise ValueError(f"rope_parameters['{name}'] is a number {words} {least}, got {value!r}.")


def _is_above_0(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def check_positions(positions_BT, length):
    """Raises a ValueError for positions that a table of learned ones does not have.

    Args:
        positions_BT: of the tokens.
        length: rows of the table, a config's max_position_embeddings.
    """
    if torch.compiler.is_compiling():
        return
    fits = (positions_BT < length).all()
    if positions_BT.device.type != "cpu":
        torch._assert_async(fits)  # reading the value would stall the host
    elif not fits:
        raise ValueError(
            f"learned positions end at max_position_embeddings = {length}, got position "
            f"{int(positions_BT.max())}; shorten the text, or train with a larger table."
        )


def rotation_of(positions_BT, angle_K):
    """(cos, sin) of each position, [B, T, 1, K / 2].

    Of a product of a position that may exceed a million with a small number: in float32 the angle
    would be off by hundredths of a radian.

    Args:
        positions_BT: of the tokens.
        angle_K: radians per position for each pair of channels, [K / 2] or [B, T, K / 2], float64.
    """
    radians_BTK = positions_BT[..., None] * angle_K
    return radians_BTK.cos()[:, :, None], radians_BTK.sin()[:, :, None]


class RotaryPositions(nn.Module):
    """The angle of each position, as transformers computes it from `rope_parameters`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.angle = Constant(functools.partial(self.angles, config))
        self.scaling = 1.0
        if self.rope_type != "default":
            self.scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)[1]
        if self.rope_type == "longrope":
            self.trained_length = config.rope_parameters["original_max_position_embeddings"]
            length = self.trained_length + 1
            self.long_angle = Constant(functools.partial(self.angles, config, length))

    @staticmethod
    def angles(config, length=None):
        """Radians per position for each pair of channels that is turned, in float64.

        Those of scaled rotations are transformers' float32 numbers.
        """
        rope_type = config.rope_parameters["rope_type"]
        if rope_type in ("default", "dynamic"):
            size = num_rotated_channels(config)
            steps_K = torch.arange(0, size, 2, dtype=torch.float64) / size
            return config.rope_parameters["rope_theta"] ** -steps_K
        return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)[0].double()

    def forward(self, positions_BT):
        """(cos, sin) of each position, [B, T, 1, K / 2]."""
        angle_BTK = self.angle(positions_BT.device)
        if self.rope_type == "longrope":
            is_long_BT1 = positions_BT[..., None] >= self.trained_length
            angle_BTK = torch.where(is_long_BT1, self.long_angle(positions_BT.device), angle_BTK)
        elif self.rope_type == "dynamic":
            angle_BTK = angle_BTK * self.dynamic_scale(positions_BT, angle_BTK.dtype)
        cos_BTHK, sin_BTHK = rotation_of(positions_BT, angle_BTK)
        return cos_BTHK * self.scaling, sin_BTHK * self.scaling

    def dynamic_scale(self, positions_BT, dtype):
        """What a base that grows with the length of the text makes of each angle, [B, T, K / 2]."""
        dim, factor = num_rotated_channels(self.config), self.config.rope_parameters["factor"]
        trained = length_limit(self.config)
        length_BT1 = (positions_BT[..., None] + 1).clamp(min=trained).to(dtype)
        growth_BT1 = (factor * length_BT1 / trained - (factor - 1)) ** (dim / (dim - 2))
        steps_K = torch.arange(0, dim, 2, device=positions_BT.device, dtype=dtype) / dim
        return growth_BT1**-steps_K
