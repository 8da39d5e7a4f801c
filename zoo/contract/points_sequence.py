"""Points 1 to 4: pieces, padding, packing and causality change nothing."""

import functools
import itertools
from typing import ClassVar

import torch

from .compare import (
    BOUNDS,
    NAMES,
    Bounds,
    gradients,
    loss_of,
    loss_weight,
    relative,
    relative_gradients,
    relative_states,
    worst_of,
)
from .held_choices import SHARE_IN_32_BITS, FreeChoices, choices_in, held_for
from .subject import cache_tensors, generator, state_tensors

# Around the chunk length of a chunked operator, and prime beyond it.
LENGTHS = (1, 63, 64, 65, 131)
CHOOSES = "it chooses some of many: rounding may choose otherwise; float64 compares as it is"
# Lengths of pieces, repeated until the sequence ends.
PIECES = {
    "token by token": (1,),
    "in pieces of 13": (13,),
    "in pieces of 7, 64, 1, 3": (7, 64, 1, 3),
    "in pieces of 97": (97,),
}


def cut(length, sizes):
    """Sizes of the pieces of a sequence of this length: the given ones, over and over."""
    pieces = []
    for size in itertools.cycle(sizes):
        pieces.append(min(size, length - sum(pieces)))
        if sum(pieces) == length:
            return pieces


def whole_equals_pieces(subject, checks):
    """Point 1: logits, state and gradients do not depend on how a sequence is cut.

    A model that chooses some of many has its choices compared in float64, and results in float32
    where they agree (zoo/contract/held_choices.py).
    """
    for dtype, bound in BOUNDS.items():
        model, ids = subject.model(dtype), subject.ids(2, LENGTHS[-1])
        held = held_for(subject, dtype, ids)
        with checks.case(f"without a cache = with one, {NAMES[dtype]}"), held.given_to(model):
            without = subject.forward(model, ids).logits
            checks.below("logits", relative(without, subject.run(model, ids)[0]), bound)
        bounds = Bounds(subject, dtype, functools.partial(Runs, subject, held=held))
        whole = functools.cache(functools.partial(Runs, subject, model, held=held))
        for name, sizes in PIECES.items():
            with checks.case(f"{name}, {NAMES[dtype]}"):
                pieces = Runs(subject, model, sizes, held)
                held.check(checks, SHARE_IN_32_BITS)
                for what, distance in Runs.distances.items():
                    figure = distance(getattr(pieces, what), getattr(whole(), what))
                    checks.below(what, figure, bounds.of(what, distance, figure))
        # Where nobody asks for gradients a step may be other code.
        with checks.case(f"token by token, no gradients, {NAMES[dtype]}"), torch.no_grad():
            steps = Runs(subject, model, (1,), held)
            held.check(checks, SHARE_IN_32_BITS)
            for what in ("logits", "state"):
                distance = Runs.distances[what]
                figure = distance(getattr(steps, what), getattr(whole(), what))
                checks.below(what, figure, bounds.of(what, distance, figure))
    _on_a_gpu(subject, checks)


class Runs:
    """Logits, state and gradients of sequences of several lengths, fed in pieces of these sizes.

    The shorter ones are beginnings of the longest. Where a piece of that ends with one of them, it
    has been fed as it would be alone, and is read there.
    """

    distances: ClassVar = {
        "logits": worst_of(relative),
        "state": worst_of(relative_states),
        "gradients": relative_gradients,
    }

    def __init__(self, subject, model, sizes=None, held=None):
        self.model, sizes = model, sizes or LENGTHS[-1:]
        with (held or FreeChoices()).given_to(model):
            self._run(subject, model, sizes)

    def _run(self, subject, model, sizes):
        ids, logits, states = subject.ids(2, LENGTHS[-1]), {}, {}
        start, pieces, cache = 0, [], None
        for size in cut(LENGTHS[-1], sizes):
            pieces.append(size)
            end = start + sum(pieces)
            if end in LENGTHS:
                found, cache = subject.run(model, ids[:, start:end], pieces, cache)
                logits[end] = torch.cat([logits[start], found], dim=1) if start else found
                states[end] = cache_tensors(cache)
                if end < LENGTHS[-1]:
                    # What follows may write into it.
                    states[end] = {name: x.detach().clone() for name, x in states[end].items()}
                start, pieces = end, []
        for length in set(LENGTHS) - states.keys():
            with torch.no_grad():
                logits[length], cache = subject.run(model, ids[:, :length], cut(length, sizes))
            states[length] = cache_tensors(cache)
        self.logits = [logits[length] for length in LENGTHS]
        self.state = [states[length] for length in LENGTHS]

    @functools.cached_property
    def gradients(self):
        """Of a loss over the logits and the final state of the longest sequence."""
        return gradients(self.model, loss_of(self.logits[-1], self.state[-1]))


def _on_a_gpu(subject, checks):
    if not torch.cuda.is_available():
        checks.not_run("on a GPU = on the CPU", "no GPU")
        return
    with checks.case("on a GPU = on the CPU"), torch.no_grad():
        ids = subject.ids(2, LENGTHS[-1])
        expected = subject.run(subject.model(), ids)[0]
        model = subject.model().to("cuda")
        for name, sizes in PIECES.items():
            logits = subject.run(model, ids.cuda(), cut(LENGTHS[-1], sizes))[0].cpu()
            checks.below(f"{name}, fp64: logits", relative(logits, expected), 1e-9)


def padded_rows(width, with_start=True):
    """A mask [B, T] with each kind of padding in a row of its own, and all of them in one row.

    Args:
        width: number of columns T.
        with_start: False: for a continuation, where rows may also have no token at all.
    """
    mask = torch.ones(6, width, dtype=torch.long)
    mask[1, : width // 5] = 0
    mask[2, -(width // 3) :] = 0
    mask[3, torch.rand(width, generator=generator(3)) < 0.4] = 0
    mask[4, torch.rand(width, generator=generator(4)) < 0.4] = 0
    mask[4, : width // 4] = 0
    mask[4, -(width // 4) :] = 0
    mask[5] = 0
    if with_start:
        mask[5, width // 2] = 1
    return mask


def _comparable(subject, checks):
    """The types in which rows and documents compare with themselves alone.

    Not float32 where a model chooses: choices are held by row and clock (points 1 and 9), and of
    these a padded or packed pass has others than the same text alone.
    """
    for dtype in BOUNDS:
        if dtype == torch.float64 or not choices_in(subject.model(dtype)):
            yield dtype
        else:
            checks.not_run(NAMES[dtype], CHOOSES)


PADDING = {1: "left", 2: "right", 3: "interior", 4: "left, right and interior", 5: "all but one"}


def padded_schedules():
    """Ways to feed a padded batch: name -> the mask of each piece."""
    start = padded_rows(71)
    one = torch.ones(6, 1, dtype=torch.long)
    masked_rows = one.clone()
    masked_rows[[1, 3, 5]] = 0
    return {
        "at once": [start],
        "then token by token": [start] + 5 * [one],
        "then in pieces": [start, one.expand(6, 9), one.expand(6, 2)],
        "then single tokens, masked in some rows": [start, masked_rows, one, masked_rows, one],
        "then padded pieces": [start, padded_rows(11, False), one.expand(6, 3), padded_rows(70)],
    }


def positions_of(mask):
    """position_ids that count the tokens of each row, as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def padding_changes_nothing(subject, checks):
    """Point 2: a padded batch is its rows alone, and so is what continues from it."""
    subject.require("attention_mask")
    for dtype in _comparable(subject, checks):
        model = subject.model(dtype)
        for name, masks in padded_schedules().items():
            with checks.case(f"{name}, {NAMES[dtype]}"), torch.no_grad():
                _compare_rows(subject, checks, model, masks)
    model, bound = subject.model(), BOUNDS[torch.float64]
    with checks.case("attention_mask without position_ids"), torch.no_grad():
        for name in ("at once", "then padded pieces"):
            with checks.case(name):
                _compare_rows(subject, checks, model, padded_schedules()[name], False)
    with checks.case("a row that begins in the second piece"), torch.no_grad():
        masks = [torch.tensor([[1, 1, 1], [0, 0, 0]]), torch.ones(2, 5, dtype=torch.long)]
        _compare_rows(subject, checks, model, masks)
    with checks.case("other ids under the mask"), torch.no_grad():
        mask = padded_rows(71)
        outputs = []
        for seed in (0, 1):
            hidden = subject.ids(*mask.shape, seed=seed)
            ids = torch.where(mask == 1, subject.ids(*mask.shape), hidden)
            outputs.append(subject.run(model, ids, None, None, mask, positions_of(mask))[0])
        visible = mask.bool()
        same = torch.equal(outputs[0][visible], outputs[1][visible])
        checks.holds("logits, bit for bit", same)
    with checks.case("hidden states of a padded batch"), torch.no_grad():
        mask = padded_rows(71)
        ids, worst = subject.ids(*mask.shape), 0.0
        settings = {"output_hidden_states": True}
        positions = {"position_ids": positions_of(mask)} if subject.accepts("position_ids") else {}
        output = model(input_ids=ids, attention_mask=mask, **positions, **settings)
        for row, visible in enumerate(mask.bool()):
            alone = model(input_ids=ids[row, visible][None], **settings).hidden_states
            for found, expected in zip(output.hidden_states, alone, strict=True):
                worst = max(worst, relative(found[row, visible], expected[0]))
        checks.below("", worst, bound)
    with checks.case("gradients of a padded batch"):
        mask = padded_rows(71)
        ids = subject.ids(*mask.shape)
        logits, _ = subject.run(model, ids, None, None, mask, positions_of(mask))
        weight = loss_weight(logits.shape, logits)
        found = gradients(model, (logits * weight)[mask.bool()].sum())
        loss = 0
        for row, visible in enumerate(mask.bool()):
            logits, _ = subject.run(model, ids[row, visible][None])
            loss = loss + (logits[0] * weight[row, visible]).sum()
        checks.below("", relative_gradients(found, gradients(model, loss)), bound)


class Rows:
    """The rows of a padded batch, each run alone without its padding."""

    def __init__(self, subject, model, ids, visible):
        rows = [x[mask][None] for x, mask in zip(ids, visible)]
        runs = [subject.run(model, row) for row in rows]
        self.logits = [logits[0] for logits, _ in runs]
        self.caches = [cache for _, cache in runs]

    @property
    def state(self):
        return [state_tensors(cache) for cache in self.caches]


def _compare_rows(subject, checks, model, masks, with_positions=True):
    mask = torch.cat(masks, dim=1)
    ids, visible = subject.ids(*mask.shape), mask.bool()
    positions = positions_of(mask) if with_positions else None
    outputs, cache, start = [], None, 0
    for piece in masks:
        end = start + piece.shape[1]
        piece_positions = None if positions is None else positions[:, start:end]
        logits, cache = subject.run(
            model, ids[:, start:end], None, cache, mask[:, :end], piece_positions
        )
        outputs.append(logits)
        start = end
    logits = torch.cat(outputs, dim=1)
    alone = Rows(subject, model, ids, visible)
    bounds = Bounds(subject, model.dtype, lambda other: Rows(subject, other, ids, visible))
    logits = [x[mask] for x, mask in zip(logits, visible)]
    error = worst_of(relative)(logits, alone.logits)
    bound = bounds.of("logits", worst_of(relative), error)
    if len(masks) == 1 and with_positions:
        for row, padding in PADDING.items():
            checks.below(
                f"{padding} padding: logits", relative(logits[row], alone.logits[row]), bound
            )
    checks.below("logits", error, bound)
    with checks.case("state of each row"):
        batch = state_tensors(cache)
        state = [
            {name: x[row : row + 1] if x.ndim else x for name, x in batch.items()}
            for row in range(len(ids))
        ]
        distance = worst_of(relative_states)
        error = distance(state, alone.state)
        checks.below("", error, bounds.of("state", distance, error))


# Documents of one token, first, side by side and before the last, and one longer than a chunk.
DOCUMENTS = (1, 37, 1, 1, 65, 2, 1, 24)


class Packed:
    """Documents laid end to end in one row, and what they give when run alone."""

    def __init__(self, subject, model, lengths=DOCUMENTS):
        self.lengths = lengths
        self.ids = subject.ids(1, sum(lengths))
        self.documents = self.ids.split(lengths, dim=1)
        self.positions = torch.cat([torch.arange(n) for n in lengths])[None]
        self.seq_idx = torch.repeat_interleave(torch.tensor(lengths))[None]
        self.cu_seq_lens_q = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        runs = [subject.run(model, ids) for ids in self.documents]
        self.logits = torch.cat([logits for logits, _ in runs], dim=1)
        self.gradients = gradients(model, loss_of(self.logits))
        self.last_cache = runs[-1][1]

    @property
    def state(self):
        """What the last document leaves."""
        return state_tensors(self.last_cache)


def packing_changes_nothing(subject, checks):
    """Point 3: packed documents are the documents alone."""
    subject.require("position_ids")
    exact = None
    for dtype in _comparable(subject, checks):
        model, bound = subject.model(dtype), BOUNDS[dtype]
        packed = Packed(subject, model)
        exact = exact or (model, packed, bound)  # float64 comes first
        bounds = Bounds(subject, dtype, lambda other: Packed(subject, other))
        ways = {
            "position_ids alone": {"positions": packed.positions},
            "cu_seq_lens_q alone": {"cu_seq_lens_q": packed.cu_seq_lens_q},
            "cu_seq_lens_q and position_ids": {
                "cu_seq_lens_q": packed.cu_seq_lens_q,
                "positions": packed.positions,
            },
            "seq_idx alone": {"seq_idx": packed.seq_idx},
        }
        for name, inputs in ways.items():
            with checks.case(f"{name}, {NAMES[dtype]}"):
                # As in training, where nothing asks for a cache.
                logits = subject.forward(model, packed.ids, **inputs).logits
                error = relative(logits, packed.logits)
                checks.below("logits", error, bounds.of("logits", relative, error))
                error = relative_gradients(gradients(model, loss_of(logits)), packed.gradients)
                bound = bounds.of("gradients", relative_gradients, error)
                checks.below("gradients", error, bound)
                _compare_last_document(subject, checks, model, packed, inputs, bounds)
    model, packed, bound = exact
    with checks.case("pieces that cut documents"):
        for name, sizes in PIECES.items():
            logits, cache = subject.run(
                model, packed.ids, cut(sum(DOCUMENTS), sizes), positions=packed.positions
            )
            checks.below(f"{name}: logits", relative(logits, packed.logits), bound)
            found = gradients(model, loss_of(logits))
            checks.below(f"{name}: gradients", relative_gradients(found, packed.gradients), bound)
            checks.below(
                f"{name}: state", relative_states(state_tensors(cache), packed.state), bound
            )
    with checks.case("cu_seq_lens_q, cut inside a document"), torch.no_grad():
        subject.require("cu_seq_lens_q")
        _cut_cu_seqlens(subject, checks, model, packed, bound)
    with checks.case("packed and padded"), torch.no_grad():
        _packed_and_padded(subject, checks, model, bound)
    with checks.case("one document's logits, another's embeddings"):
        embeds = model.get_input_embeddings()(packed.ids).detach().requires_grad_()
        inputs = {"inputs_embeds": embeds, "positions": packed.positions}
        logits = subject.forward(model, **inputs).logits
        start, end = packed.cu_seq_lens_q[4:6].tolist()
        (grad,) = torch.autograd.grad(logits[0, start:end].square().sum(), embeds)
        outside = torch.cat([grad[0, :start], grad[0, end:]]).abs().max().item()
        checks.below("gradient between them", outside, 0)


def _compare_last_document(subject, checks, model, packed, inputs, bounds):
    """What is left in the cache after the stream is the state of its last document."""
    with torch.no_grad(), checks.case("state"):
        output = subject.forward(model, packed.ids, use_cache=True, **inputs)
        cache = subject.cache_of(output)
        error = relative_states(state_tensors(cache), packed.state)
        checks.below("", error, bounds.of("state", relative_states, error))
        more = subject.ids(1, 5, seed=2)
        expected, _ = subject.run(model, torch.cat([packed.documents[-1], more], dim=1))
        logits, _ = subject.run(model, more, cache=cache)
        error = relative(logits, expected[:, -5:])
        checks.below("logits of a continuation", error, bounds.of("logits", relative, error))


def _cut_cu_seqlens(subject, checks, model, packed, bound):
    # 20 and 75 lie inside documents; a piece that begins with a new document says so by position.
    total, logits, cache = sum(DOCUMENTS), [], None
    for start, end in itertools.pairwise([0, 20, 75, total]):
        inside = [n for n in packed.cu_seq_lens_q.tolist() if start < n < end]
        output = subject.forward(
            model,
            packed.ids[:, start:end],
            cache,
            cu_seq_lens_q=torch.tensor([start, *inside, end]) - start,
            use_cache=True,
        )
        cache = subject.cache_of(output)
        logits.append(output.logits)
    checks.below("logits", relative(torch.cat(logits, dim=1), packed.logits), bound)
    checks.below("state", relative_states(state_tensors(cache), packed.state), bound)


def _packed_and_padded(subject, checks, model, bound):
    """Each row holds several documents, with padding before, between, inside and after them."""
    rows = ((9, 1, 30), (40,), (1, 1, 5, 66))
    width = 90
    ids = subject.ids(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    for row, lengths in enumerate(rows):
        columns = torch.randperm(width, generator=generator(row))[: sum(lengths)].sort().values
        mask[row, columns] = 1
        positions[row, columns] = torch.cat([torch.arange(n) for n in lengths])
    for name, sizes in {"at once": (width,), "in pieces of 7, 64, 1, 3": (7, 64, 1, 3)}.items():
        pieces = cut(width, sizes)
        logits, _ = subject.run(model, ids, pieces, None, mask, positions)
        worst = 0.0
        for row, lengths in enumerate(rows):
            visible = mask[row].bool()
            documents = ids[row, visible][None].split(lengths, dim=1)
            alone = [subject.run(model, document)[0] for document in documents]
            worst = max(worst, relative(logits[row, visible], torch.cat(alone, dim=1)[0]))
        checks.below(f"{name}: logits", worst, bound)


def no_future_leaks(subject, checks):
    """Point 4: a token changes nothing before it, and reaches as far as the paper promises."""
    model = subject.model()
    length = LENGTHS[-1]
    ids = subject.ids(1, length)
    # An architecture that does not see all tokens says which.
    is_seen = torch.ones(length, dtype=torch.bool)
    if hasattr(model, "visible_tokens"):
        is_seen = model.visible_tokens(length)
    # And one that chooses some of many, which others it may see.
    may_be_seen = is_seen
    if hasattr(model, "choosable_tokens"):
        may_be_seen = model.choosable_tokens(length)
    with torch.no_grad():
        for name, run in {
            "whole": lambda x: subject.forward(model, x).logits,
            "in pieces of 7, 64, 1, 3": lambda x: subject.run(model, x, cut(length, (7, 64, 1, 3)))[
                0
            ],
        }.items():
            with checks.case(f"another token, {name}"):
                before = run(ids)
                changed_early, unchanged_late = 0, 0
                places = (1, 62, 63, 64, 65, length - 2)
                for place in places:
                    other = ids.clone()
                    other[0, place] = ids[0, place] % (subject.vocab_size - 1) + 1
                    after = run(other)
                    same = (after == before).all(-1)[0]
                    changed_early += (~same[:place]).sum().item()
                    unchanged_late += same[place].item() + (is_seen[place] & same[-1]).item()
                checks.below("earlier logits that changed", changed_early, 0)
                checks.below("own and last logits that did not", unchanged_late, 0)
    with checks.case("receptive field"):
        subject.require("inputs_embeds")
        for module in model.modules():
            if getattr(module, "detaches_memory", False):  # as it trains, where it sees more
                module.detaches_memory = False
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = subject.forward(model, None, inputs_embeds=embeds).logits
        (grad,) = torch.autograd.grad(logits[0, -1].square().sum(), embeds)
        reach = grad[0].abs().amax(-1)
        has_influence = reach > 0
        unseen = (is_seen & ~has_influence).sum().item()
        checks.below("promised tokens without influence", unseen, 0)
        beyond = (has_influence & ~may_be_seen).sum().item()
        checks.below("tokens beyond it with influence", beyond, 0)
