"""What the referee asks a model of others: pairs of runs that its users expect to agree.

A probe runs the model in one of the `ways` and in a second one that should give the same, on input
of given sizes, so that a difference can be shown on the smallest. What no documentation and no
practice promises is asked too, and told apart from failures: it is `promised` by nobody.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM

from . import ways
from .compare import gradients, loss_of, relative, relative_gradients
from .points_library import aligned
from .points_scale import without_dropout
from .points_sequence import cut, positions_of
from .report import NotApplicable, first_line
from .subject import cache_tensors, held_bytes

SAME = 0.0  # the bound of figures that count what differs


@dataclass
class Probe:
    """Two runs that should agree.

    Attributes:
        point: number of the contract's point.
        name: what is compared with what.
        pair: (subject, model, ids function, sizes) -> (found, expected): tensors, or dictionaries
            of gradients. The ids function gives ids of a shape, the same beginning each time.
        sizes: of the input, by name; `least`: the smallest that make sense.
        promise: who relies on it.
        applies: subject -> why it cannot be asked, or None.
        promised: subject, model -> whether anybody may rely on it.
        bound: of the figure; None: by the precision the model computes in.
        needs_grad: whether the runs are differentiated.
        is_choice: whether tokens are compared, which a near tie may turn over.
    """

    point: int
    name: str
    pair: Callable
    sizes: dict = field(default_factory=dict)
    least: dict = field(default_factory=dict)
    promise: str = ""
    applies: Callable = lambda subject: None
    promised: Callable = lambda subject, model: True
    bound: float | None = None
    needs_grad: bool = False
    is_choice: bool = False

    @property
    def may_be_refused(self):
        """Whether a class may say in words that it does not offer this; to run is not an offer."""
        return self.pair not in (cached_or_not, token_by_token, greedy, later_tokens, labelled)


def distance(found, expected):
    """How far two results of a probe are apart, relative to the largest value."""
    if isinstance(found, dict):
        return relative_gradients(found, expected)
    if isinstance(found, list):
        return max(map(relative, found, expected))
    if not found.is_floating_point():
        if found.shape != expected.shape:
            raise ValueError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
        return float((found != expected).sum())
    return relative(found, expected)


# What a class can be asked.


def no_generate(subject):
    """Why nothing of `generate` can be asked, or None."""
    return None if subject.can_generate else "it has no generate"


def no_mask(subject):
    """Why padding cannot be asked about, or None."""
    if not subject.accepts("attention_mask"):
        return "its forward has no argument attention_mask: it is not for padded batches"
    return None


def is_stateful(subject):
    """Whether the class says that its cache cannot go back and is made for `generate` alone."""
    return bool(getattr(subject.model_class, "_is_stateful", False))


def _no_generate_or_mask(subject):
    return no_generate(subject) or no_mask(subject)


def _no_going_back(subject):
    if is_stateful(subject):
        return "a stateful class: generate refuses assistants for it"
    return no_generate(subject)


def _keeps_keys(subject, model):
    """Whether the class is one of keys and values, whose cache any number of tokens may follow."""
    return subject.cache_argument in ("past_key_values", "cache") and not is_stateful(subject)


def _needs_no_positions(subject, model):
    """Whether a cache alone says where a token stands, or there is no such thing as where."""
    if subject.cache_argument == "cache" and not subject.accepts("position_ids"):
        return True  # cache_params, by its newer name
    return _keeps_keys(subject, model) or subject.cache_argument in ("cache_params", "state")


def takes_documents(subject, model):
    """Whether a class says that it keeps packed documents apart.

    It does if its forward names an argument that tells them apart, or if its body hands what it
    was given to its layers instead of dropping it. Of softmax attention alone this is not enough:
    all such classes hand on what flash attention would use. It does if this attention is told too.
    """
    told = {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens"}
    if _keeps_keys(subject, model) and not _attention_is_told(subject, model):
        return False
    if told & subject.arguments:
        return True
    batch = ways.flattened([subject.ids(3), subject.ids(3)], True)
    with ways.arguments_of_layers(model) as names:
        try:
            model.base_model(**batch)
        except Exception:
            # It may refuse what it does not name, or what a layer got and cannot do here.
            pass
    return bool(told & names)


def _attention_is_told(subject, model):
    """Whether position_ids that begin anew hide what is before: an explicit mask unhides it."""
    if not (subject.accepts("position_ids") and subject.accepts("attention_mask")):
        return False
    batch = ways.flattened([subject.ids(5, seed=1), subject.ids(5, seed=2)], False)
    ids, positions = batch["input_ids"], batch["position_ids"]
    told, untold = (
        ways.whole(subject, model, ids, position_ids=positions, attention_mask=mask)
        for mask in (None, torch.ones_like(ids))
    )
    return not torch.allclose(told, untold, rtol=0, atol=1e-4 * told.abs().max().item())


# Point 1


def cached_or_not(subject, model, ids, sizes):
    """Logits of a forward pass with a cache, and without one."""
    ids = ids(sizes["rows"], sizes["tokens"])
    return (
        ways.whole(subject, model, ids, use_cache=True),
        ways.whole(subject, model, ids),
    )


def token_by_token(subject, model, ids, sizes):
    """`generate` choosing the tokens of a text, and the text in one forward pass."""
    prompt = sizes["prompt"]
    ids = ids(sizes["rows"], prompt + sizes["new"])
    found, _ = ways.dictated(subject, model, ids, prompt)
    return found, ways.whole(subject, model, ids)[:, prompt - 1 :]


def conversation(subject, model, ids, sizes):
    """`generate`, then `generate` from its cache with more tokens; and the text at once."""
    total = sizes["first"] + sizes["second"] + 2
    ids = ids(sizes["rows"], total)
    found = ways.continued(subject, model, ids, sizes["first"], sizes["second"])
    return found, ways.whole(subject, model, ids)[:, -found.shape[1] :]


def chunked_prefill(subject, model, ids, sizes):
    """`generate` with a prompt in chunks, and the text at once."""
    prompt = sizes["prompt"]
    ids = ids(1, prompt + 2)
    found, _ = ways.dictated(subject, model, ids, prompt, prefill_chunk_size=sizes["chunk"])
    return found, ways.whole(subject, model, ids)[:, prompt - 1 :]


def pieces(subject, model, ids, sizes):
    """Forward passes over pieces, each from the cache of the one before; and the text at once."""
    ids = ids(sizes["rows"], sizes["tokens"])
    found = ways.in_pieces(subject, model, ids, cut(sizes["tokens"], (sizes["piece"],)))
    return found, ways.whole(subject, model, ids)


# Point 2


def _rows(ids, sizes):
    """Rows of which each is one `padding` shorter than the one before, down to one token."""
    rows = ids(sizes["rows"], sizes["tokens"])
    return [row[: max(1, len(row) - i * sizes["padding"])] for i, row in enumerate(rows)]


def left_padding(subject, model, ids, sizes):
    """`generate` on prompts padded on the left, and each row alone in one forward pass."""
    texts = ids(sizes["rows"], sizes["tokens"] + sizes["new"])
    prompts = _rows(lambda *_: texts[:, : sizes["tokens"]], sizes)
    batch, mask = ways.padded(prompts, "left")
    batch = torch.cat([batch, texts[:, sizes["tokens"] :]], dim=1)
    found, _ = ways.dictated(subject, model, batch, sizes["tokens"], mask)
    expected = []
    for row, prompt in zip(batch, prompts):
        text = row[sizes["tokens"] - len(prompt) :]
        expected.append(ways.whole(subject, model, text[None])[0, len(prompt) - 1 :])
    return list(found), expected


def right_padding(subject, model, ids, sizes):
    """A forward pass over rows padded on the right, as in training, and each row alone."""
    rows = _rows(ids, sizes)
    batch, mask = ways.padded(rows, "right")
    logits = ways.whole(subject, model, batch, attention_mask=mask)
    return (
        [x[: len(row)] for x, row in zip(logits, rows)],
        [ways.whole(subject, model, row[None])[0] for row in rows],
    )


def right_padding_gradients(subject, model, ids, sizes):
    """The same for the gradients of a loss over what is not padding."""
    found, expected = right_padding(subject, model, ids, sizes)
    return tuple(gradients(model, sum(map(loss_of, x))) for x in (found, expected))


def left_padding_at_once(subject, model, ids, sizes):
    """A forward pass over rows padded on the left without position_ids, and each row alone."""
    rows = _rows(ids, sizes)
    batch, mask = ways.padded(rows, "left")
    logits = ways.whole(subject, model, batch, attention_mask=mask)
    return (
        [x[-len(row) :] for x, row in zip(logits, rows)],
        [ways.whole(subject, model, row[None])[0] for row in rows],
    )


def _inner_padding(with_positions):
    def pair(subject, model, ids, sizes):
        ids, start = ids(1, sizes["tokens"]), sizes["tokens"] // 2
        mask = torch.ones_like(ids)
        mask[0, start : start + sizes["padding"]] = 0
        positions = {"position_ids": positions_of(mask)} if with_positions else {}
        visible = mask.bool()
        logits = ways.whole(subject, model, ids, attention_mask=mask, **positions)
        return logits[visible], ways.whole(subject, model, ids[visible][None])[0]

    return pair


# Point 3


def _packed(with_all):
    def pair(subject, model, ids, sizes):
        documents = list(ids(sizes["documents"], sizes["tokens"]))
        batch = ways.flattened(documents, with_all)
        found = ways.whole(subject, model, batch.pop("input_ids"), **batch)[0]
        alone = [ways.whole(subject, model, x[None])[0] for x in documents]
        return found, torch.cat(alone)

    return pair


def packed_gradients(subject, model, ids, sizes):
    """Gradients of documents packed with all that tells them apart, and of each alone."""
    found, expected = _packed(True)(subject, model, ids, sizes)
    return tuple(gradients(model, loss_of(x)) for x in (found, expected))


def documents_in_pieces(subject, model, ids, sizes):
    """Packed documents fed token by token, told apart by position_ids alone."""
    documents = list(ids(sizes["documents"], sizes["tokens"]))
    batch = ways.flattened(documents, False)
    total, positions = sizes["documents"] * sizes["tokens"], batch["position_ids"]
    found = subject.run(model, batch["input_ids"], [1] * total, positions=positions)[0][0]
    return found, torch.cat([ways.whole(subject, model, x[None])[0] for x in documents])


# Point 4


def later_tokens(subject, model, ids, sizes):
    """Logits before a token that is replaced."""
    text, place = ids(1, sizes["before"] + sizes["after"]), sizes["before"]
    other = text.clone()
    other[0, place:] = text[0, place:] % (subject.vocab_size - 1) + 1
    return (
        ways.whole(subject, model, other)[:, :place],
        ways.whole(subject, model, text)[:, :place],
    )


def own_token(subject, model, ids, sizes):
    """Whether the last token changes its own logits at all: 0 if it does, and 0 is expected."""
    text = ids(1, sizes["tokens"])
    other = text.clone()
    other[0, -1] = text[0, -1] % (subject.vocab_size - 1) + 1
    logits = [ways.whole(subject, model, x)[0, -1] for x in (text, other)]
    return torch.tensor([int(torch.equal(*logits))]), torch.tensor([0])


# Point 5


def _choice(name, expected_settings=None, **settings):
    """`generate` in a way of its own, and with other settings that should choose the same."""

    def pair(subject, model, ids, sizes):
        prompt = ids(sizes["rows"], sizes["prompt"])
        chosen = []
        for chosen_settings in (settings, expected_settings or {}):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                chosen.append(
                    ways.generated(subject, model, prompt, sizes["new"], **chosen_settings)
                )
        return tuple(chosen)

    return pair


def greedy(subject, model, ids, sizes):
    """Greedy `generate`, and the argmax of forward passes over a text that grows."""
    text = ids(sizes["rows"], sizes["prompt"])
    found = ways.generated(subject, model, text, sizes["new"])
    for _ in range(sizes["new"]):
        following = ways.whole(subject, model, text)[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, following], dim=1)
    return found, text


def assisted(subject, model, ids, sizes):
    """`generate` with another model's drafts, and without."""
    prompt = ids(1, sizes["prompt"])
    assistant = subject.model(next(model.parameters()).dtype, seed=1)
    found = ways.generated(subject, model, prompt, sizes["new"], assistant_model=assistant)
    return found, ways.generated(subject, model, prompt, sizes["new"])


def from_embeddings(subject, model, ids, sizes):
    """`generate` from inputs_embeds, and from ids."""
    prompt = ids(sizes["rows"], sizes["prompt"])
    embeds = model.get_input_embeddings()(prompt)
    found = ways.generated(
        subject,
        model,
        None,
        sizes["new"],
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
    )
    return found, ways.generated(subject, model, prompt, sizes["new"])[:, sizes["prompt"] :]


# Point 6


def _saved(dtype=None):
    def pair(subject, model, ids, sizes):
        ids = ids(1, sizes["tokens"])
        with tempfile.TemporaryDirectory() as folder:
            kept = model if dtype is None else copy.deepcopy(model).to(torch.float32)
            kept.save_pretrained(folder)
            loaded = _loaded(subject, folder, dtype or next(model.parameters()).dtype)
        if dtype is not None:
            model = kept.to(dtype)
        return ways.whole(subject, loaded, ids), ways.whole(subject, model, ids)

    return pair


def _loaded(subject, folder, dtype):
    loaded, info = subject.model_class.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
    if wrong:
        raise ValueError(f"weights missing, unexpected or misshapen: {', '.join(wrong[:4])}")
    return aligned(loaded)


def saved_by_auto(subject, model, ids, sizes):
    """A saved model loaded by AutoModelForCausalLM, and the model."""
    ids = ids(1, sizes["tokens"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=next(model.parameters()).dtype
            )
        except ValueError as error:
            raise NotApplicable(first_line(error)) from None
    return ways.whole(subject, aligned(loaded), ids), ways.whole(subject, model, ids)


def resized(subject, model, ids, sizes):
    """The old tokens' logits after resize_token_embeddings, and before."""
    ids = ids(1, sizes["tokens"])
    more = copy.deepcopy(model)
    more.resize_token_embeddings(subject.vocab_size + sizes["more"], mean_resizing=False)
    found = ways.whole(subject, more, ids)
    if found.shape[-1] != subject.vocab_size + sizes["more"]:
        raise ValueError(f"{found.shape[-1]} logits for {subject.vocab_size + sizes['more']} ids")
    return found[..., : subject.vocab_size], ways.whole(subject, model, ids)


# Point 7


def state_bytes(subject, model, ids, sizes):
    """Bytes of the cache after a long text, and after a short one."""
    found = []
    for length in (sizes["tokens"], sizes["short"]):
        cache = subject.run(model, ids(1, length))[1]
        tensors = cache_tensors(cache)
        if any(path.endswith((".keys", ".values")) for path in tensors):
            raise NotApplicable("attention layers keep keys and values of the tokens they see")
        found.append(torch.tensor([held_bytes(tensors.values())]))
    return tuple(found)


# Point 8


def checkpointed(subject, model, ids, sizes):
    """Gradients in training mode with checkpointing, and without."""
    ids = ids(sizes["rows"], sizes["tokens"])
    found = []
    for enable in (True, False):
        one = copy.deepcopy(model)
        if enable:
            one.gradient_checkpointing_enable()
        _trained(one)
        found.append(gradients(one, loss_of(ways.whole(subject, one, ids))))
    _require_no_chance(subject, one, ids)
    return tuple(found)


def _trained(model):
    """Puts a model in training mode, with all dropout off that is a module or a number of one."""
    without_dropout(model.train())
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _require_no_chance(subject, model, ids):
    """Raises NotApplicable if a model gives something else each time."""
    results = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            results.append(ways.whole(subject, model, ids))
    if not torch.equal(*results):
        raise NotApplicable("in training mode it draws at random, and dropout is not all of it")


def trained_or_not(subject, model, ids, sizes):
    """Logits in training mode without dropout, and in eval mode."""
    ids = ids(sizes["rows"], sizes["tokens"])
    one = _trained(copy.deepcopy(model))
    _require_no_chance(subject, one, ids)
    return ways.whole(subject, one, ids), ways.whole(subject, model, ids)


def compiled(subject, model, ids, sizes):
    """A forward pass traced in one graph, and the forward pass."""
    ids = ids(1, sizes["tokens"])
    settings = {"use_cache": False} if subject.accepts("use_cache") else {}
    torch._dynamo.reset()
    traced = torch.compile(
        lambda x: model(input_ids=x, **settings).logits, fullgraph=True, backend="eager"
    )
    try:
        return traced(ids), ways.whole(subject, model, ids)
    finally:
        torch._dynamo.reset()


# Point 9


def sixteen_bits(subject, model, ids, sizes):
    """How much of a bf16 run's logits is not finite: 0 is expected."""
    logits = ways.whole(subject, copy.deepcopy(model).to(torch.bfloat16), ids(1, sizes["tokens"]))
    wrong = (~torch.isfinite(logits)).sum().reshape(1)
    return wrong, torch.zeros_like(wrong)


# Point 10


def labelled(subject, model, ids, sizes):
    """The loss that `labels` give, and the mean cross entropy of each next token that counts."""
    ids = ids(sizes["rows"], sizes["tokens"])
    labels = ids.clone()
    labels[:, : sizes["ignored"]] = -100
    logits = ways.whole(subject, model, ids)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
    settings = {"use_cache": False} if subject.accepts("use_cache") else {}
    output = model(input_ids=ids, labels=labels, **settings)
    if output.loss is None:
        raise ValueError("labels give no loss")
    return output.loss.reshape(1), expected.reshape(1)


def unused_weights(subject, model, ids, sizes):
    """How many parameters no gradient reaches: 0 is expected."""
    logits = ways.whole(subject, model, ids(sizes["rows"], sizes["tokens"]))
    dead = [name for name, x in gradients(model, loss_of(logits)).items() if not x.any()]
    if dead:
        shown = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        raise ValueError(f"{len(dead)} parameters without a gradient: {shown}")
    return torch.tensor([0]), torch.tensor([0])


NOBODY = lambda subject, model: False  # noqa: E731
TWO_ROWS = {"rows": 2, "tokens": 70}
LEAST_ROWS = {"rows": 1, "tokens": 1}
PADDED = {"rows": 3, "tokens": 30, "padding": 7}
LEAST_PADDED = {"rows": 2, "tokens": 2, "padding": 1}
DOCUMENTS = {"documents": 4, "tokens": 19}
LEAST_DOCUMENTS = {"documents": 2, "tokens": 1}
CHOICE = {"rows": 2, "prompt": 7, "new": 8}
LEAST_CHOICE = {"rows": 1, "prompt": 1, "new": 1}
INNER = {"tokens": 30, "padding": 7}
LEAST_INNER = {"tokens": 3, "padding": 1}


def probes_for(subject):
    """All probes, the most telling first.

    Args:
        subject: its config says which lengths it cuts sequences at.
    """
    decoding = {
        "promise": "everybody who generates text",
        "applies": no_generate,
        "least": {"rows": 1, "prompt": 1, "new": 1},
    }
    first = [
        Probe(
            1,
            "generate, token by token = whole",
            token_by_token,
            {"rows": 2, "prompt": 9, "new": 12},
            **decoding,
        ),
        Probe(
            2,
            "prompts padded on the left in generate = each alone",
            left_padding,
            PADDED | {"new": 4},
            LEAST_PADDED | {"new": 1},
            "generate on a batch, as tokenizers with padding_side='left' prepare it",
            _no_generate_or_mask,
        ),
        Probe(
            2,
            "rows padded on the right = each alone",
            right_padding,
            PADDED,
            LEAST_PADDED,
            "training and scoring in batches, as every padding collator prepares them",
            no_mask,
        ),
        Probe(
            3,
            "packed with position_ids, seq_idx and cu_seq_lens = each document alone",
            _packed(True),
            DOCUMENTS,
            LEAST_DOCUMENTS,
            "training on what DataCollatorWithFlattening packs, by a class that takes it",
            promised=takes_documents,
        ),
        Probe(
            4,
            "later tokens do not matter",
            later_tokens,
            {"before": 35, "after": 35},
            {"before": 1, "after": 1},
            "everybody who trains on next tokens",
        ),
        Probe(
            1,
            "with a cache = without",
            cached_or_not,
            TWO_ROWS,
            LEAST_ROWS,
            "scoring with the default use_cache",
            lambda x: None if x.accepts("use_cache") else "its forward has no use_cache",
        ),
        Probe(
            5,
            "greedy generate = argmax of forward passes",
            greedy,
            CHOICE,
            LEAST_CHOICE,
            "everybody who generates text",
            no_generate,
            bound=SAME,
            is_choice=True,
        ),
    ]
    cuts = [
        Probe(
            1,
            f"generate after a prompt of {prompt} = whole",
            token_by_token,
            {"rows": 2, "prompt": prompt, "new": 4 if prompt > 1 else 40},
            **decoding,
        )
        for prompt in cut_points(subject)
    ]
    later = [
        Probe(
            10,
            "the loss of labels = cross entropy of next tokens",
            labelled,
            {"rows": 2, "tokens": 30, "ignored": 5},
            {"rows": 1, "tokens": 2, "ignored": 0},
            "Trainer",
            lambda x: None if x.accepts("labels") else "its forward takes no labels",
            bound=1e-5,  # losses are computed in float32
        ),
        Probe(
            2,
            "gradients of rows padded on the right = of each alone",
            right_padding_gradients,
            PADDED,
            LEAST_PADDED,
            "training in batches",
            no_mask,
            needs_grad=True,
        ),
        Probe(
            3,
            "gradients of packed documents = of each alone",
            packed_gradients,
            DOCUMENTS,
            LEAST_DOCUMENTS,
            "training on packed documents",
            promised=takes_documents,
            needs_grad=True,
        ),
        Probe(
            5,
            "3 beams with a cache = without",
            _choice("beams", {"num_beams": 3, "use_cache": False}, num_beams=3),
            CHOICE,
            LEAST_CHOICE,
            "beam search, which reorders the cache",
            no_generate,
            bound=SAME,
            is_choice=True,
        ),
        Probe(
            5,
            "sampling with a seed, with a cache = without",
            _choice(
                "sampling",
                {"do_sample": True, "top_k": 20, "use_cache": False},
                do_sample=True,
                top_k=20,
            ),
            CHOICE,
            LEAST_CHOICE,
            "everybody who samples",
            no_generate,
            bound=SAME,
            is_choice=True,
        ),
        Probe(
            1,
            "generate from a cache with more tokens = whole",
            conversation,
            {"rows": 2, "first": 21, "second": 14},
            {"rows": 1, "first": 2, "second": 1},
            "a conversation that goes on from its cache",
            no_generate,
            _keeps_keys,
        ),
        Probe(
            1,
            "generate with a prompt in chunks = whole",
            chunked_prefill,
            {"prompt": 40, "chunk": 13},
            {"prompt": 2, "chunk": 1},
            "prefill_chunk_size",
            no_generate,
            _keeps_keys,
        ),
        Probe(
            5,
            "drafts looked up in the prompt = greedy",
            _choice("lookup", prompt_lookup_num_tokens=3),
            {"rows": 1, "prompt": 21, "new": 8},
            {"rows": 1, "prompt": 2, "new": 1},
            "prompt_lookup_num_tokens",
            _no_going_back,
            bound=SAME,
            is_choice=True,
        ),
        Probe(
            5,
            "another model's drafts = greedy",
            assisted,
            {"prompt": 21, "new": 8},
            {"prompt": 1, "new": 1},
            "assistant_model",
            _no_going_back,
            bound=SAME,
            is_choice=True,
        ),
        Probe(
            5,
            "generate from inputs_embeds = from ids",
            from_embeddings,
            CHOICE,
            LEAST_CHOICE,
            "generate(inputs_embeds=...)",
            lambda x: (
                (None if x.accepts("inputs_embeds") else "its forward has no inputs_embeds")
                or no_generate(x)
            ),
            bound=SAME,
            is_choice=True,
        ),
        Probe(
            6,
            "saved and loaded",
            _saved(),
            {"tokens": 20},
            {"tokens": 1},
            "save_pretrained, from_pretrained",
            bound=SAME,
        ),
        Probe(
            6,
            "saved and loaded by AutoModelForCausalLM",
            saved_by_auto,
            {"tokens": 20},
            {"tokens": 1},
            "the Auto classes",
            lambda x: "its code lies outside transformers" if x.is_remote else None,
            bound=SAME,
        ),
        Probe(
            6,
            "logits of the old tokens after resize_token_embeddings",
            resized,
            {"tokens": 20, "more": 7},
            {"tokens": 1, "more": 1},
            "adding tokens",
        ),
        Probe(
            9,
            "bf16 gives finite logits",
            sixteen_bits,
            {"tokens": 131},
            {"tokens": 1},
            "everybody who runs in bf16",
            bound=SAME,
        ),
        Probe(
            9,
            "loaded as bf16 = moved to bf16",
            _saved(torch.bfloat16),
            {"tokens": 20},
            {"tokens": 1},
            "from_pretrained(dtype=torch.bfloat16)",
            promised=NOBODY,  # moved, a table of rotations is rounded too; loaded, it is not
            bound=SAME,
        ),
        Probe(
            8,
            "training mode without dropout = eval mode",
            trained_or_not,
            {"rows": 2, "tokens": 40},
            LEAST_ROWS,
            "a loss that means the same in training and in evaluation",
        ),
        Probe(
            8,
            "gradients with checkpointing = without",
            checkpointed,
            {"rows": 2, "tokens": 40},
            LEAST_ROWS,
            "gradient_checkpointing_enable",
            lambda x: (
                None
                if getattr(x.model_class, "supports_gradient_checkpointing", False)
                else "the class does not support it"
            ),
            needs_grad=True,
        ),
        Probe(
            7,
            "bytes of the state after a long text = after a short one",
            state_bytes,
            {"tokens": 300, "short": 5},
            {"tokens": 6, "short": 1},
            "a state of constant size",
            lambda x: (
                no_generate(x)
                or (
                    None
                    if is_stateful(x) and x.cache_argument
                    else "it keeps keys and values of every token, or no cache is to be seen"
                )
            ),
            bound=SAME,
        ),
        # What nobody promises, asked all the same.
        Probe(
            3,
            "packed with position_ids alone = each document alone",
            _packed(False),
            DOCUMENTS,
            LEAST_DOCUMENTS,
            "training on position_ids alone",
            promised=NOBODY,
        ),
        Probe(
            2,
            "left padding in one forward pass without position_ids = each alone",
            left_padding_at_once,
            PADDED,
            LEAST_PADDED,
            "scoring a batch padded on the left",
            no_mask,
            NOBODY,
        ),
        Probe(
            2,
            "padding in the middle without position_ids",
            _inner_padding(False),
            INNER,
            LEAST_INNER,
            "nobody",
            no_mask,
            NOBODY,
        ),
        Probe(
            2,
            "padding in the middle with position_ids",
            _inner_padding(True),
            INNER,
            LEAST_INNER,
            "nobody",
            lambda x: (
                no_mask(x)
                or (None if x.accepts("position_ids") else "its forward has no position_ids")
            ),
            NOBODY,
        ),
        Probe(
            1,
            "forward passes over pieces of 13 = whole",
            pieces,
            {"rows": 2, "tokens": 70, "piece": 13},
            {"rows": 1, "tokens": 2, "piece": 1},
            "own loops over forward",
            promised=_keeps_keys,
        ),
        Probe(
            1,
            "forward passes token by token = whole",
            pieces,
            {"rows": 2, "tokens": 40, "piece": 1},
            {"rows": 1, "tokens": 2, "piece": 1},
            "own loops over forward",
            promised=_needs_no_positions,
        ),
        Probe(
            3,
            "packed documents cut token by token",
            documents_in_pieces,
            DOCUMENTS,
            LEAST_DOCUMENTS,
            "nobody",
            lambda x: None if x.accepts("position_ids") else "its forward has no position_ids",
            NOBODY,
        ),
        Probe(
            4,
            "the last token changes its own logits",
            own_token,
            {"tokens": 9},
            {"tokens": 1},
            "everybody",
            bound=SAME,
        ),
        Probe(
            10,
            "every parameter has a gradient",
            unused_weights,
            {"rows": 4, "tokens": 64},
            {"rows": 4, "tokens": 64},
            "nobody",
            promised=NOBODY,
            needs_grad=True,
            bound=SAME,
        ),
        Probe(
            8,
            "torch.compile, full graph = eager",
            compiled,
            {"tokens": 40},
            {"tokens": 1},
            "classes that say _can_compile_fullgraph",
            lambda x: (
                None
                if getattr(x.model_class, "_can_compile_fullgraph", False)
                else "the class does not promise a full graph"
            ),
        ),
    ]
    return [_within(subject, probe) for probe in first + cuts + later]


CUT_FIELDS = (
    "chunk_size",
    "mamba_chunk_size",
    "block_size",
    "sliding_window",
    "attention_window_size",
)
LONGEST_CUT = 300


def inner_lengths(subject):
    """The lengths a config says that sequences are cut at inside: field -> number."""
    config = subject.config.get_text_config()
    found = {name: getattr(config, name, None) for name in CUT_FIELDS}
    return {name: x for name, x in found.items() if isinstance(x, int) and x > 0}


def cut_points(subject):
    """Prompt lengths at which a cache is most likely to be handed over wrongly."""
    points = {1, 2, 3, 65}
    for length in inner_lengths(subject).values():
        if length < LONGEST_CUT:
            points |= {length - 1, length, length + 1}
    return sorted(points - {0})


def _within(subject, probe):
    """A probe whose sizes a model with learned positions has room for."""
    room = getattr(subject.config, "max_position_embeddings", None)
    if not isinstance(room, int) or room <= 0:
        return probe
    cap = {
        name: min(x, max(probe.least.get(name, 1), room // 4)) for name, x in probe.sizes.items()
    }
    if sum(x for name, x in probe.sizes.items() if name != "rows") > room:
        probe.sizes = cap
    return probe
