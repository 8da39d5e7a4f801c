"""Softmax attention of layers with a `rope_extension`: other angles for far keys than for near.

See zoo/layers/rope_extension.py for the mathematics. Nothing that is kept is turned again. Keys lie
in the state as far ones are turned, the newest w of them once more in a ring, as near ones are;
dual_chunk needs one copy. In bytes per layer and sequence, for S tokens of a text (with a window
the slots of its ring instead), G heads of keys and values of width K, and b bytes per number:

    rerope, leaky_rerope, self_extend   b G K (2 S + w)
    dual_chunk                          b G K 2 S   (as without an extension)
"""

import torch

from ..core.state import StateSpec
from ..core.window import Past, gather_ring, ring_positions, row_spans, write_slot
from ..kernels.extended_attention import (
    Part,
    extended_attention,
    extended_attention_reference,
    extended_attention_step,
)
from .positions import rotate
from .rope_extension import near_window, reach_bounds
from .softmax_attention import SoftmaxAttention, check_extended_implementation, longer

# Of dual_chunk, a step looks at the newest keys apart where all are more than so many times them.
FEW_OF_ALL = 2


class ExtendedAttention(SoftmaxAttention):
    """Softmax attention with RoPE and a `rope_extension`; arguments as of `SoftmaxAttention`."""

    has_plain_step = False

    def __init__(self, config, layer_idx, **options):
        super().__init__(config, layer_idx, **options)
        self.near_window = near_window(config.rope_extension)
        self.bounds = reach_bounds(config.rope_extension)

    def state_specs(self):
        """Keys as far ones are turned, values, and a ring of the newest keys as near ones are."""
        specs = super().state_specs()
        if self.near_window is not None:
            spec = specs["keys_BWHK"]
            shape = (self.near_window, *spec.shape[1:])
            specs["near_keys_BWHK"] = StateSpec(shape, dtype=spec.dtype)
        return specs

    def turn(self, q_BTHK, k_BTHK, rotation, sink_rotation):
        """(queries for each range of distances, copies of the keys, where the ranges end).

        Args:
            q_BTHK, k_BTHK: queries and keys.
            rotation: an `ExtendedRotation`.
            sink_rotation: None.
        """
        dtype = q_BTHK.dtype
        if rotation.scale is not None:
            wide = torch.promote_types(dtype, torch.float32)
            q_BTHK = q_BTHK.to(wide) * rotation.scale.to(wide)
        queries = [rotate(q_BTHK, *turns).to(dtype) for turns in rotation.queries]
        return queries, [rotate(k_BTHK, *turns) for turns in rotation.keys], rotation.reaches

    def parts(self, queries, keys, reaches):
        """The `Part`s of a pass or a step, of all copies of the keys or of one for all."""
        keys = keys * (len(queries) // len(keys))
        rows = zip(queries, keys, (*reaches, None), (*self.bounds, None), strict=True)
        return [Part(*row) for row in rows]

    def run_step(self, queries, keys, v_BTHV, reaches, sequence, state):
        """One token per row: writes its slots, and looks at all that are filled, in any order."""
        batch, device = len(v_BTHV), v_BTHV.device
        clock_B, specs = sequence.clock[:, 0].expand(batch), self.state_specs()
        new = {"keys_BWHK": keys[-1], "values_BWHV": v_BTHV, "near_keys_BWHK": keys[0]}
        for name, spec in specs.items():
            x_BTHK, held_BSHK, size = new[name], getattr(state, name), spec.shape[0]
            if size is None:
                held_BSHK, slot_B = longer(held_BSHK, 1, x_BTHK, spec), clock_B
            else:
                slot_B = clock_B % size
                if held_BSHK is None:
                    held_BSHK = x_BTHK.new_zeros(batch, *spec.shape, dtype=spec.dtype)
            held_BSHK = write_slot(
                held_BSHK, x_BTHK[:, 0], slot_B, sequence.keep, state.may_overwrite
            )
            setattr(state, name, held_BSHK)
        keys_BSHK = state.keys_BWHK
        size = keys_BSHK.shape[1]
        distance_BS = clock_B[:, None] - torch.arange(size, device=device)
        if self.window is not None:
            is_filled_BS = distance_BS >= 0
            distance_BS = torch.where(is_filled_BS, distance_BS % self.window, -1)
        parts = self.parts(queries, [keys_BSHK], reaches)
        if self.near_window is not None:
            near_BWHK = state.near_keys_BWHK[:, :size]
            numbers_BW = ring_positions(clock_B + 1, self.near_window)[:, :size]
            slots_BW = self.slots_of(numbers_BW, torch.arange(near_BWHK.shape[1], device=device))
            parts[0] = parts[0]._replace(k=near_BWHK, slots=slots_BW)
        elif size > FEW_OF_ALL * self.bounds[-1][1]:
            # Only the newest can be of the query's chunk or of the one before.
            back_W = torch.arange(self.bounds[-1][1], device=device)
            slots_BW = self.slots_of(clock_B[:, None] - back_W, back_W)
            newest_BWHK = keys_BSHK[torch.arange(batch, device=device)[:, None], slots_BW]
            parts[:2] = [part._replace(k=newest_BWHK, slots=slots_BW) for part in parts[:2]]
        check_extended_implementation(self.config._attn_implementation)
        return extended_attention_step(parts, state.values_BWHV, distance_BS, scale=self.scale)

    def slots_of(self, numbers_BW, empty_W):
        """Where tokens of these numbers lie; below 0: in `empty_W`, of which none is filled yet."""
        slots_BW = numbers_BW if self.window is None else numbers_BW % self.window
        return torch.where(numbers_BW < 0, empty_W, slots_BW)

    def run_pass(self, queries, keys, v_BTHV, reaches, sequence, state):
        """Any number of tokens, dense or packed, after what the state holds."""
        if sequence.ranks is not None:
            new = {"keys_BWHK": keys[-1], "values_BWHV": v_BTHV, "near_keys_BWHK": keys[0]}
            self.bring(new, sequence, state)
        documents, past = {"cu_seqlens": sequence.cu_seqlens}, None
        all_keys, values_BSHV = keys, v_BTHV
        if state.keys_BWHK is not None:
            size = state.keys_BWHK.shape[1] if self.window is None else self.window - 1
            past = Past(sequence, state.keys_BWHK, size)
            documents = {"cu_seqlens": past.cu_seqlens, "first_key": past.first_key}
            all_keys = [past.put_before(keys[-1], state.keys_BWHK)]
            values_BSHV = past.put_before(v_BTHV, state.values_BWHV)
            if self.near_window is not None:
                # As many as of the others, so of older ones than the ring has, some that are not
                # looked at.
                near = Past(sequence, state.near_keys_BWHK, size)
                all_keys.insert(0, near.put_before(keys[0], state.near_keys_BWHK))
            queries = [past.pick(q_BTHK) for q_BTHK in queries]
            reaches = [past.pick(x) if torch.is_tensor(x) else x for x in reaches]
        name = self.config._attn_implementation
        check_extended_implementation(name)
        operator = extended_attention if name == "banded" else extended_attention_reference
        parts = self.parts(queries, all_keys, reaches)
        y_BTHV = operator(parts, values_BSHV, self.window, scale=self.scale, **documents)
        if state.is_kept:
            self.keep(keys[-1], v_BTHV, sequence, state)
            if self.near_window is not None:
                self.keep_near(keys[0], sequence, state)
        return y_BTHV if past is None else past.drop(y_BTHV)

    def keep_near(self, k_BTHK, sequence, state):
        """Brings the ring of the newest keys up to date."""
        spans, spec = row_spans(sequence), self.state_specs()["near_keys_BWHK"]
        positions_BW = ring_positions(spans.after, self.near_window)
        state.near_keys_BWHK = gather_ring(
            k_BTHK.to(spec.dtype), state.near_keys_BWHK, positions_BW, spans
        )
