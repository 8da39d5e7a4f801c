"""The ways people run a causal LM: what each gives, as logits to compare with those of another.

Everything goes through what transformers itself calls: `forward` for training and scoring,
`generate` for the rest, so a model is asked as its users ask it, whatever its cache is called.
"""

import contextlib

import torch
from transformers import DataCollatorWithFlattening, LogitsProcessor, LogitsProcessorList

from .report import NotApplicable
from .subject import generator


class WrongShape(Exception):
    """A model gave something of another shape than it was asked for."""


def whole(subject, model, ids, **inputs):
    """Logits [B, T, V] of one forward pass without a cache, as in training and scoring."""
    if subject.accepts("use_cache"):
        inputs.setdefault("use_cache", False)
    subject.check_time()
    logits = model(input_ids=ids, **inputs).logits
    if logits.shape[:2] != ids.shape:
        raise WrongShape(f"logits of {list(logits.shape)} for ids of shape {list(ids.shape)}")
    return logits


class _Dictate(LogitsProcessor):
    """Makes `generate` choose given tokens, whatever the model prefers."""

    def __init__(self, ids, num_prompt):
        self.ids, self.step, self.num_prompt = ids, 0, num_prompt

    def __call__(self, input_ids, scores):
        column = min(self.num_prompt + self.step, self.ids.shape[1] - 1)
        self.step += 1
        dictated = torch.full_like(scores, -torch.inf)
        return dictated.scatter_(1, self.ids[:, column, None], 0.0)


def dictated(subject, model, ids, num_prompt, mask=None, **settings):
    """Runs `generate` on a prompt and has it choose the tokens that follow in `ids`.

    Args:
        ids: [B, T]; the first `num_prompt` columns are the prompt.
        num_prompt: length of the prompt, padding included.
        mask: [B, num_prompt], 0 where the prompt is padded; None: nowhere.
        settings: for `generate`.

    Returns:
        (logits [B, T - num_prompt + 1, V] of the prompt's last column and of every later one, in
        the precision the model gave them in; what `generate` returned).
    """
    if not hasattr(model, "generate"):
        raise NotApplicable("it has no generate")
    subject.check_time()
    seen = []

    def look(_, args, inputs, output):
        given = inputs.get("input_ids")
        shape = output.logits.shape
        # Fewer columns are what logits_to_keep asks for.
        if given is not None and (shape[0] != len(given) or shape[1] > given.shape[1]):
            raise WrongShape(f"logits of {list(shape)} for input_ids of {list(given.shape)}")
        seen.append(output.logits[:, -1])

    handle = model.register_forward_hook(look, with_kwargs=True)
    num_steps = ids.shape[1] - num_prompt + 1
    try:
        output = model.generate(
            ids[:, :num_prompt],
            attention_mask=torch.ones_like(ids[:, :num_prompt]) if mask is None else mask,
            max_new_tokens=num_steps,
            do_sample=False,
            logits_processor=LogitsProcessorList([_Dictate(ids, num_prompt)]),
            return_dict_in_generate=True,
            **settings,
        )
    finally:
        handle.remove()
    return torch.stack(seen[-num_steps:], dim=1), output


def generated(subject, model, ids, num_new, **settings):
    """What `generate` chooses: [B, T + num_new] ids, greedily where `settings` do not say else."""
    if not hasattr(model, "generate"):
        raise NotApplicable("it has no generate")
    subject.check_time()
    settings = {"do_sample": False, "max_new_tokens": num_new} | settings
    if "inputs_embeds" not in settings:
        settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(**({} if ids is None else {"input_ids": ids}), **settings)


def continued(subject, model, ids, first, second):
    """A conversation: `generate` on `first` tokens, then again with its cache and more tokens.

    Returns:
        The logits of the last columns, from the first the second call gives on.
    """
    name = subject.cache_argument
    _, output = dictated(subject, model, ids[:, :first], first - 1 or 1)
    cache = getattr(output, name, None) if name else None
    if cache is None:
        raise NotApplicable("generate returns no cache to go on from")
    return dictated(subject, model, ids, first + second, **{name: cache})[0]


def in_pieces(subject, model, ids, sizes):
    """Logits of forward passes that each go on from the cache of the one before."""
    return subject.run(model, ids, sizes)[0]


def padded(rows, side):
    """Lays rows of different lengths side by side.

    Args:
        rows: of ids, [T_i] each.
        side: "left" or "right", where the padding is.

    Returns:
        (ids [B, T], with random ids as padding; mask [B, T]).
    """
    width = max(map(len, rows))
    ids, mask = [], []
    for number, row in enumerate(rows):
        more = width - len(row)
        # Any id may be a padding token, and the mask is to hide whatever it is.
        largest = int(max(x.max() for x in rows))
        filler = torch.randint(1, largest + 1, (more,), generator=generator(number))
        is_row = torch.ones_like(row)
        parts, masks = [filler, row], [torch.zeros_like(filler), is_row]
        ids.append(torch.cat(parts if side == "left" else parts[::-1]))
        mask.append(torch.cat(masks if side == "left" else masks[::-1]))
    return torch.stack(ids), torch.stack(mask)


def flattened(documents, with_all):
    """Documents packed into one row, by transformers' own collator.

    Args:
        documents: of ids, [T_i] each.
        with_all: True: with `seq_idx` and `cu_seq_lens` beside `position_ids`.

    Returns:
        The batch, but its labels.
    """
    more = {"return_flash_attn_kwargs": True, "return_seq_idx": True} if with_all else {}
    collator = DataCollatorWithFlattening(return_position_ids=True, **more)
    batch = collator([{"input_ids": x.tolist()} for x in documents])
    return {name: x for name, x in batch.items() if name != "labels"}


@contextlib.contextmanager
def arguments_of_layers(model):
    """Collects the names of arguments that a model hands to the modules it is made of."""
    names, handles = set(), []
    inner = [x for x in model.modules() if x is not model and x is not model.base_model]
    for module in inner:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: names.update(kwargs), with_kwargs=True
            )
        )
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
