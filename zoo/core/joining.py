"""Parallel context windows: the states of several texts joined into one, as if each came first.

Ratner et al. 2022, https://arxiv.org/abs/2212.10947. Windows are run apart, each from position 0 on
(or, indented at the right, so that all end at the same position), and what follows, the task, sees
the tokens of all of them, at positions that go on from the longest:

    window w:  its tokens see their own window alone, at positions 0 to len_w - 1
               (right: max_len - len_w to max_len - 1)
    task:      token n, at position max_len + n, sees all windows' tokens and the task's before it

Windows begin alike, with a token for the start of a text; only the longest window's is seen by the
task. Nothing is trained. It takes a state that is a list of tokens, in which any may follow any
other: full attention where positions are in the keys (RoPE) or nowhere (NoPE).
"""

import torch

from .state import GrowingStateLayer, new_cache

# Values of a first layer are of one token's embedding alone. The same token's differ in rounding;
# those of two tokens are as far apart as they are long.
SAME_TOKEN = 0.1


def join_states(
    caches, config, *, rows=None, num_start_tokens=1, next_position=None, check_start=True
):
    """One cache from those of several windows; a text that goes on from it sees all of them.

    `model.join_states(caches)` is the same with the model's own config, in an exported folder too.
    A forward pass from the joined cache, and `generate`, go on at the right positions by
    themselves; its columns count from here, so that an attention mask is one of the new tokens.

        windows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        caches = [model(ids, use_cache=True).past_key_values for ids in windows]
        joined = model.join_states(caches)
        model.generate(**tokenizer(task, add_special_tokens=False, return_tensors="pt"),
                       past_key_values=joined)

    or, with the windows as rows of one batch, padded at the left (where position_ids that count
    all columns, padding too, are indentation at the right):

        cache = model(**tokenizer(texts, padding=True, return_tensors="pt"),
                      use_cache=True).past_key_values
        joined = model.join_states(cache)

    Args:
        caches: a list of caches of as many rows each: row b of the result has row b of each. Or one
            cache, whose rows are the windows of one row. They stay as they are.
        config: the model's.
        rows: for each row of the result, the indices of its windows among the rows of all caches,
            counted through; None: as above.
        num_start_tokens: how many tokens all windows begin with alike, 1 for a token that starts
            each text; of these only the longest window's stay (the first of several as long). 0:
            all tokens of all windows stay.
        next_position: the position of the next token, a number or [B]; None: one more than the
            largest of any window in its row, if windows counted from 0 or were indented at the
            right.
        check_start: whether to see that windows begin alike, by what the first layer made of it.

    Returns:
        A cache of B rows, the longest window first in each.

    Raises:
        ValueError: a model whose state is no list of tokens, caches that do not fit, or windows
            that do not begin alike.
    """
    if not config.state_is_list_of_tokens:
        raise ValueError(
            "join_states joins states that are lists of tokens, in all layers: full attention with "
            f"RoPE or without positions; got {type(config).__name__} with {_kind_of(config)}."
        )
    caches = list(caches) if isinstance(caches, (list, tuple)) else [caches]
    _check_caches(caches, config)
    rows = _windows_of_rows(caches, rows)
    clocks, positions = [], []
    for cache in caches:
        first = cache.layers[0]
        shift_B = first.position_shift
        clocks += first.clock.tolist()
        positions += (first.clock if shift_B is None else first.clock + shift_B).tolist()
    shortest = min(clocks[window] for windows in rows for window in windows)
    if not 0 <= num_start_tokens < shortest:
        raise ValueError(
            "num_start_tokens is at least 0 and less than the tokens of each window, got "
            f"{num_start_tokens} and a window of {shortest}."
        )
    if num_start_tokens and check_start:
        _check_start(caches, rows, num_start_tokens)
    pieces = []  # of each row: windows with their first token and how many there are
    for windows in rows:
        longest = max(windows, key=lambda window: clocks[window])
        others = [window for window in windows if window != longest]
        first = [(longest, 0, clocks[longest])]
        pieces.append(first + [(window, num_start_tokens, clocks[window]) for window in others])
    count_B = torch.tensor([sum(end - start for _, start, end in row) for row in pieces])
    next_B = torch.tensor([max(positions[window] for window in windows) for windows in rows])
    if next_position is not None:
        next_B = _checked_positions(next_position, len(rows))
    joined = new_cache(config)
    for index, layer in enumerate(joined.layers):
        own = [cache.layers[index] for cache in caches]
        device = own[0].clock.device
        layer.tensors = {
            name: _joined_slots([x.tensors[name] for x in own], pieces, int(count_B.max()))
            for name in own[0].tensors
        }
        layer.clock = count_B.to(device)
        layer.position_shift = (next_B - count_B).to(device)
        layer.is_one_document = False  # its clock says nothing of the columns of a mask
    return joined


def _kind_of(config):
    kinds = sorted({name.removeprefix("zoo_") for name in config.layer_types})
    positions = getattr(config, "position_embedding_type", "rope")
    words = "" if positions == "rope" else f", position_embedding_type {positions!r}"
    words += ", a rope_extension" if getattr(config, "rope_extension", None) else ""
    return f"layers of {' and '.join(kinds)}{words}"


def _check_caches(caches, config):
    """Raises a ValueError for caches that are not those of one model, after a forward pass."""
    expected = config.num_hidden_layers
    for cache in caches:
        layers = getattr(cache, "layers", [])
        if len(layers) != expected or any(type(x) is not GrowingStateLayer for x in layers):
            kinds = sorted({type(x).__name__ for x in layers})
            raise ValueError(
                f"join_states: expected caches of {expected} {GrowingStateLayer.__name__}s of this "
                f"model, got {len(layers)} layers of {', '.join(kinds) or type(cache).__name__}; "
                "run the model on each window with use_cache=True."
            )
        if any(not layer.tensors or layer.pending_length for layer in layers):
            raise ValueError(
                "join_states: expected caches after a forward pass, got one without tokens or with "
                "tokens to run again after crop(); run the model on each window first."
            )
    if not caches:
        raise ValueError("join_states: expected at least one cache, got none.")
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        kinds = {
            tuple((name, x.shape[2:], x.dtype, x.device) for name, x in layer.tensors.items())
            for layer in layers
        }
        if len(kinds) > 1:
            raise ValueError(
                "join_states: expected caches of one model, got layers of different shapes, dtypes "
                "or devices; run all windows through the same model."
            )


def _windows_of_rows(caches, rows):
    """For each row of the result, the windows in it: indices through the rows of all caches."""
    sizes = [len(cache.layers[0].clock) for cache in caches]
    if rows is None:
        if len(caches) == 1:
            return [list(range(sizes[0]))]
        if len({*sizes}) > 1:
            raise ValueError(
                f"join_states: expected caches of as many rows each, got {sizes}; say with rows "
                "which windows each row of the result has."
            )
        return [list(range(row, sum(sizes), sizes[0])) for row in range(sizes[0])]
    rows = [list(windows) for windows in rows]
    for windows in rows:
        fits = all(isinstance(x, int) and 0 <= x < sum(sizes) for x in windows)
        if not windows or not fits or len({*windows}) < len(windows):
            raise ValueError(
                "join_states: rows has, for each row of the result, different indices from 0 to "
                f"{sum(sizes) - 1}, at least one, got {windows}."
            )
    if not rows:
        raise ValueError("join_states: expected at least one row, got rows = [].")
    return rows


def _checked_positions(next_position, num_rows):
    """[B], from a number or one for each row."""
    position_B = torch.as_tensor(next_position, device="cpu")
    is_whole = position_B.dtype in (torch.int64, torch.int32)
    if not is_whole or position_B.shape not in ((), (num_rows,)) or bool((position_B < 1).any()):
        raise ValueError(
            "join_states: next_position is a whole number of at least 1 (a text at 0 is a new "
            f"one), or one for each of {num_rows} rows, got {next_position}."
        )
    return position_B.long().expand(num_rows)


def _check_start(caches, rows, num_start_tokens):
    """Raises a ValueError if windows of a row begin with different tokens.

    By the values of the first layer, which are those of a token's embedding, wherever it is.
    """
    held = [cache.layers[0].tensors for cache in caches]
    held = [x for tensors in held for name, x in tensors.items() if name.startswith("values")]
    values = [window_TDK[:num_start_tokens] for x_BTDK in held for window_TDK in x_BTDK]
    for windows in rows:
        first = values[windows[0]].float()
        for window in windows[1:]:
            far = (values[window].float() - first).norm() > SAME_TOKEN * first.norm()
            if bool(far):
                raise ValueError(
                    f"join_states: windows {windows[0]} and {window} do not begin with the same "
                    f"num_start_tokens = {num_start_tokens} token(s); begin each alike "
                    "(bos_token_id), or pass num_start_tokens=0 to keep all."
                )


def _joined_slots(tensors, pieces, size):
    """The slots of each row's windows behind one another, [B, size, ...], zeros after the last."""
    windows = [window_TDK for x_BTDK in tensors for window_TDK in x_BTDK]
    rows = []
    for row in pieces:
        parts = [windows[window][start:end] for window, start, end in row]
        missing = size - sum(len(part) for part in parts)
        rows.append(torch.cat([*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])]))
    return torch.stack(rows)
