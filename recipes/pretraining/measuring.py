"""What is measured of a model: in training its loss on held-out text and samples to look at, and of
a stream the loss by position, the attention on sinks and the state.
"""

import time

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from zoo.core.state import state_bytes

from .corpus import held_out_batches
from .recipe import UsageError
from .reporting import bits_per_byte
from .slicing import share_of, whole_rows
from .zero import is_zero, small_parameters

ROWS, PIECE = 2, 256  # streams at once, and tokens of each per forward pass: fastest on one core


def own_slices(accelerator, model, tokens, recipe):
    """This process's part of held-out text in windows of `sequence_length`, on its device.

    Args:
        accelerator: of the run.
        model: what runs them, in none of accelerate's wrappers.
        tokens: the text.
        recipe: of the run.

    Yields:
        The column of the windows that a batch begins at, and the batch.
    """
    share = share_of(accelerator, model)
    sizes = recipe.sequence_length, recipe.eval_batch_size, recipe.packing
    for windows in held_out_batches(tokens, *sizes, share.rank, share.world):
        first, _ = share.bounds(windows["input_ids"].shape[1])
        yield first, {key: x.to(accelerator.device) for key, x in share.cut(windows).items()}


def own_batches(accelerator, model, tokens, recipe):
    """The same without the columns."""
    for _, batch in own_slices(accelerator, model, tokens, recipe):
        yield batch


@torch.no_grad()
def held_out_bits_per_byte(accelerator, model, tokens, recipe):
    """Bits per byte of held-out text in windows of `sequence_length`, each target scored once.

    The cost of the boundaries is included although they are no bytes of the text, so a comparison
    with a compressor errs to the model's disadvantage. So do the windows: each begins afresh.
    """
    # Not compiled: the last window is shorter, and would be compiled for once.
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    nats = torch.zeros((), device=accelerator.device)
    for batch in own_batches(accelerator, model, tokens, recipe):
        # Divided by one item, the mean loss is a sum.
        labels = {"labels": batch["shift_labels"], "num_items_in_batch": 1}
        nats += model(**batch, **labels, use_cache=False).loss
    model.train()
    return bits_per_byte(accelerator.reduce(nats, "sum").item(), tokens.num_bytes)


def held_out_figures(accelerator, model, parts, recipe):
    """Bits per byte of all held-out text, and of each source where there are several, by name."""
    texts = {part.name: part.corpus.held_out for part in parts}
    values = {
        name: held_out_bits_per_byte(accelerator, model, tokens, recipe)
        for name, tokens in texts.items()
    }
    if len(texts) == 1:
        return {"bits_per_byte": next(iter(values.values()))}
    bits = sum(values[name] * tokens.num_bytes for name, tokens in texts.items())
    num_bytes = sum(tokens.num_bytes for tokens in texts.values())
    by_source = {f"bits_per_byte/{name}": value for name, value in values.items()}
    return {"bits_per_byte": bits / num_bytes, **by_source}


@torch.no_grad()
def diagnostics(accelerator, model, tokens=None, recipe=None):
    """What an architecture wants watched (its `diagnostics`), by name; {} if there is nothing.

    Args:
        accelerator: of the run.
        model: the language model.
        tokens: held-out text, whose first window fills the state; None: no state.
        recipe: of the run.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not hasattr(model, "diagnostics"):
        return {}
    if tokens is None:
        with small_parameters(model):
            return model.diagnostics()
    model.eval()
    batch = next(iter(held_out_batches(tokens, recipe.sequence_length, 1, recipe.packing, 0, 1)))
    inputs = {key: x.to(accelerator.device) for key, x in batch.items() if key != "shift_labels"}
    with whole_rows(model):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    model.train()
    with small_parameters(model):
        return model.diagnostics(cache)


@torch.no_grad()
def sample(accelerator, model, tokenizer, prompt, num_tokens, seed):
    """A prompt as the start of a document, and its continuation at temperature 0.8."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    model.eval()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[tokenizer.eos_token_id, *ids]], device=accelerator.device)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # Training continues with the numbers it would have drawn.
    with torch.random.fork_rng(), whole_rows(model):
        torch.manual_seed(seed)
        mask = torch.ones_like(inputs)
        # Where weights are in shards, no process may end before the others.
        output = model.generate(
            inputs,
            attention_mask=mask,
            generation_config=settings,
            synced_gpus=accelerator.is_fsdp2 or is_zero(accelerator),
        )
    model.train()
    return tokenizer.decode(output[0], skip_special_tokens=True)


@torch.inference_mode()
def nats_by_position(model, ids, width, num_positions, rows=ROWS, piece=PIECE):
    """The mean loss in each bin of positions, with the same text in every bin.

    Args:
        model: a causal language model that goes on from its state.
        ids: [N] token ids of the circle; what a multiple of `width` leaves over is not used.
        width: positions per bin, and tokens between the beginnings of streams.
        num_positions: tokens of each stream, a multiple of `width`.
        rows: streams run at once.
        piece: tokens of each per forward pass.

    Returns:
        Nats per token, [num_positions / width] in float64.

    Raises:
        UsageError: sizes that make no circle of streams.
    """
    num_streams = len(ids) // max(width, 1)
    if width < 1 or num_positions < width or num_positions % width:
        raise UsageError(
            f"positions are a multiple of the bin's width, got {num_positions} and {width}."
        )
    if num_streams < 2:
        raise UsageError(
            f"the text fills at least two bins of {width} tokens, got {len(ids)}; use narrower "
            "bins, or a recipe with more held-out text (eval_bytes)."
        )
    ids = ids[: num_streams * width]
    sums = torch.zeros(num_positions // width, dtype=torch.float64)
    for starts in (torch.arange(num_streams) * width).split(rows):
        cache = None
        for positions in torch.arange(num_positions).split(piece):
            index_BT = (starts[:, None] + positions) % len(ids)
            output = model(ids[index_BT], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            targets_BT = ids[(index_BT + 1) % len(ids)]
            nats_BT = cross_entropy(output.logits.mT, targets_BT, reduction="none")
            sums.index_add_(0, positions // width, nats_BT.double().sum(0))
    return sums / len(ids)


@torch.inference_mode()
def attention_on_sinks(model, ids, num_streams=8):
    """The share of attention that goes to the sinks once they have left the window.

    Equal attention to everything would be S / (S + W). It is what attention makes of values that
    are one for sinks and zero for other tokens.

    Args:
        model: a `SlidingWindowForCausalLM` with sinks.
        ids: [N] token ids of the circle.
        num_streams: streams of 2 W tokens, evenly spaced, over which the share is a mean.

    Returns:
        For each layer, the share of each head.
    """
    window, shares = model.config.sliding_window, []

    def watch(attend):
        def attend_and_look(q_BTHK, k_BSHK, v_BSHV, sinks, *bias, **documents):
            ones, zeros_BSHV = sinks._replace(v=torch.ones_like(sinks.v)), torch.zeros_like(v_BSHV)
            share_BTHV = attend(q_BTHK, k_BSHK, zeros_BSHV, ones, *bias, **documents)
            first = window + model.config.num_sink_tokens - 1
            shares.append(share_BTHV[:, first:, :, 0].mean((0, 1)).tolist())
            return attend(q_BTHK, k_BSHK, v_BSHV, sinks, *bias, **documents)

        return attend_and_look

    mixers = [layer.mixer for layer in model.model.layers]
    length = 2 * window + model.config.num_sink_tokens
    starts = torch.arange(num_streams) * (len(ids) // num_streams)
    for mixer in mixers:
        mixer.attend = watch(mixer.attend)
    try:
        model(ids[(starts[:, None] + torch.arange(length)) % len(ids)], use_cache=False)
    finally:
        for mixer in mixers:
            del mixer.attend
    return shares


@torch.inference_mode()
def generate_stream(model, first_id, num_tokens, seed):
    """Samples token by token through the cache, and looks at the cache on the way.

    Args:
        model: a causal language model. Its distribution is sampled from as it is.
        first_id: the token that the stream begins with.
        num_tokens: how many to sample.
        seed: of the sampling.

    Returns:
        The ids, and a list of records: after the first token, each power of ten and each hundredth
        of the way, the bytes of state, and since the last record milliseconds of processor time per
        token, mean nats of the tokens sampled and the largest absolute logit.
    """
    generator = torch.Generator().manual_seed(seed)
    looks = {10**n for n in range(len(str(num_tokens)))}
    looks |= {-(-num_tokens * n // 100) for n in range(1, 101)}
    token_BT, cache, ids, records = torch.tensor([[first_id]]), None, [], []
    for count in range(1, num_tokens + 1):
        if len(ids) == (records[-1]["tokens"] if records else 0):
            nats, largest, began = 0.0, torch.zeros(()), time.process_time()
        output = model(token_BT, past_key_values=cache, use_cache=True)
        cache, log_p_BV = output.past_key_values, output.logits[:, -1].log_softmax(-1)
        # The maximum with a number that is none is none, so no step of a record is missed.
        largest = torch.maximum(largest, output.logits.abs().max())
        token_BT = torch.multinomial(log_p_BV.exp(), 1, generator=generator)
        ids.append(token_BT.item())
        nats -= log_p_BV[0, ids[-1]].item()
        if count in looks:
            interval = count - (records[-1]["tokens"] if records else 0)
            records.append(
                {
                    "tokens": count,
                    "state_bytes": state_bytes(cache),
                    "milliseconds_per_token": 1e3 * (time.process_time() - began) / interval,
                    "nats_per_token": nats / interval,
                    "largest_logit": largest.item(),
                }
            )
    return ids, records
