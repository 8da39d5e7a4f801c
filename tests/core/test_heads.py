"""Heads that classify: what they score, on rows apart, padded and packed, and their losses."""

import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.generic import find_labels

import zoo

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IDS = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(0))
# Padding before, after and within a row, and none of it.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0],
    ]
)
HEADS = {
    "sequence_classifier": AutoModelForSequenceClassification,
    "token_classifier": AutoModelForTokenClassification,
    "question_answerer": AutoModelForQuestionAnswering,
}

architectures = pytest.mark.parametrize("architecture", zoo.MODELS.values(), ids=zoo.MODELS)
every_head = pytest.mark.parametrize("head", HEADS)


def build(architecture, head, **fields):
    torch.manual_seed(0)
    config = architecture.config(**TINY | {"num_labels": 3} | fields)
    model = getattr(architecture, head)(config).double().eval()
    linear = model.qa_outputs if head == "question_answerer" else model.score
    with torch.no_grad():
        for p in linear.parameters():  # so that scores differ, and a bias counts
            p.normal_()
    return model, linear


def scores_of_row(model, linear, ids, mask):
    """The head's scores of a row's tokens, which go through the decoder without padding."""
    hidden_TD = model.model(ids[mask.bool()][None], use_cache=False).last_hidden_state[0]
    scores = hidden_TD @ linear.weight.T
    return scores if linear.bias is None else scores + linear.bias


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@architectures
@torch.no_grad()
def test_texts(architecture):
    model, linear = build(architecture, "sequence_classifier")
    expected = torch.stack(
        [scores_of_row(model, linear, *row)[-1] for row in zip(IDS, MASK, strict=True)]
    )
    output = model(IDS, attention_mask=MASK, labels=torch.tensor([2, -100, 1]))
    close(output.logits, expected)
    close(output.loss, -expected.log_softmax(-1)[[0, 2], [2, 1]].mean())
    embeds = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=embeds, attention_mask=MASK).logits, expected)
    # Without a mask the padding's id says where a text ends.
    model.config.pad_token_id = 0
    right = IDS.clone()
    right[1, 5:] = 0
    close(model(right).logits[1], expected[1])


@architectures
@torch.no_grad()
def test_tokens(architecture):
    model, linear = build(architecture, "token_classifier")
    labels = torch.randint(0, 3, IDS.shape, generator=torch.Generator().manual_seed(1))
    labels[:, 8] = -100
    labels[MASK == 0] = -100
    output = model(IDS, attention_mask=MASK, labels=labels)
    total = 0.0
    for row, ids in enumerate(IDS):
        kept = MASK[row].bool()
        expected = scores_of_row(model, linear, ids, kept)
        close(output.logits[row, kept], expected)
        scored = labels[row, kept] != -100
        total -= expected.log_softmax(-1)[scored, labels[row, kept][scored]].sum()
    count = (labels != -100).sum()
    # transformers computes its losses in float32.
    torch.testing.assert_close(output.loss.double(), total / count, rtol=1e-6, atol=1e-6)
    summed = model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=50).loss
    torch.testing.assert_close(summed.double(), total / 50, rtol=1e-6, atol=1e-6)


@architectures
@torch.no_grad()
def test_tokens_of_packed_documents(architecture):
    model, linear = build(architecture, "token_classifier")
    sizes = (4, 1, 6)
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    logits = model(IDS[:1], position_ids=positions).logits[0]
    for ids, found in zip(IDS[0].split(sizes), logits.split(sizes), strict=True):
        close(found, scores_of_row(model, linear, ids, torch.ones_like(ids)))


@architectures
@torch.no_grad()
def test_answers(architecture):
    model, linear = build(architecture, "question_answerer")
    # The second row has no answer, and the third one's was cut off behind its last column.
    start, end = torch.tensor([4, -100, 11]), torch.tensor([6, -100, 15])
    output = model(IDS, attention_mask=MASK, start_positions=start, end_positions=end)
    for row, ids in enumerate(IDS):
        kept = MASK[row].bool()
        expected = scores_of_row(model, linear, ids, kept)
        found = torch.stack([output.start_logits[row], output.end_logits[row]], dim=-1)
        close(found[kept], expected)
        assert (found[~kept] == torch.finfo(found.dtype).min).all()
    first = scores_of_row(model, linear, IDS[0], MASK[0]).log_softmax(0)
    # Columns 4 and 6 are the second and fourth token after three of padding.
    close(output.loss, -(first[1, 0] + first[3, 1]) / 2)
    column = {"start_positions": start[:, None], "end_positions": end[:, None]}
    close(model(IDS, attention_mask=MASK, **column).loss, output.loss)


@every_head
@architectures
def test_goes_on_from_a_state_and_takes_one_token(architecture, head):
    """A text in pieces, the last of one token, as on a whole."""
    model, _ = build(architecture, head)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask)
        cache = model.model(IDS[:, :10], use_cache=True).past_key_values
        last = model(IDS[:, 10:], attention_mask=mask, past_key_values=cache)
    if head == "sequence_classifier":
        close(last.logits, whole.logits)
    elif head == "token_classifier":
        close(last.logits, whole.logits[:, 10:])
    else:
        close(last.end_logits, whole.end_logits[:, 10:])
    assert cache.get_seq_length() == 11


@every_head
@architectures
def test_every_way_of_loading(architecture, head, tmp_path):
    """Saved and loaded, bit for bit; around a language model's decoder; pickled."""
    fields = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model, _ = build(architecture, head, tie_word_embeddings=True, num_labels=2, **fields)
    model.float().save_pretrained(tmp_path / "head")
    expected = model(IDS, attention_mask=MASK).to_tuple()
    loaded = HEADS[head].from_pretrained(tmp_path / "head")
    assert type(loaded) is getattr(architecture, head)
    assert loaded.config.id2label == fields["id2label"]
    for again in (loaded, pickle.loads(pickle.dumps(model))):
        for a, b in zip(again(IDS, attention_mask=MASK).to_tuple()[:2], expected, strict=False):
            if torch.is_tensor(a):
                assert torch.equal(a, b)
    language_model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "head", output_loading_info=True
    )
    # Its projection is the embedding; a bias is in no classifier.
    has_bias = language_model.get_output_embeddings().bias is not None
    assert {*report["missing_keys"]} == ({"lm_head.bias"} if has_bias else set())
    language_model.save_pretrained(tmp_path / "lm")
    new, report = HEADS[head].from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score", "qa_outputs"}
    embedding = new.get_input_embeddings().weight
    assert torch.equal(embedding, language_model.get_input_embeddings().weight)


@architectures
def test_what_a_trainer_takes_for_labels(architecture):
    assert find_labels(architecture.sequence_classifier) == ["labels"]
    assert find_labels(architecture.token_classifier) == ["labels"]
    assert find_labels(architecture.question_answerer) == ["start_positions", "end_positions"]


@pytest.mark.parametrize("problem", ["classes", "numbers", "several"])
def test_losses_of_texts_add_up_over_accumulated_batches(problem):
    """A Trainer divides by what it counted in all of them: labels other than -100."""
    num_labels = 1 if problem == "numbers" else 3
    model, _ = build(zoo.MODELS["retnet"], "sequence_classifier", num_labels=num_labels)
    labels = {
        "classes": torch.tensor([2, 0, 1]),
        "numbers": torch.tensor([3, 1, 4]),  # a data set's integers
        "several": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    }[problem]
    whole = model(IDS, attention_mask=MASK, labels=labels).loss
    parts = [
        model(
            IDS[rows],
            attention_mask=MASK[rows],
            labels=labels[rows],
            num_items_in_batch=torch.tensor(labels.numel()),
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    sum(parts).backward()
    close(sum(parts), whole)
    logits = model(IDS, attention_mask=MASK).logits
    by_hand = {
        "classes": lambda: -logits.log_softmax(-1)[range(3), labels].mean(),
        "numbers": lambda: (logits[:, 0] - labels).square().mean(),
        "several": lambda: (
            -torch.where(labels == 1, logits.sigmoid().log(), (-logits).sigmoid().log()).mean()
        ),
    }[problem]()
    close(whole, by_hand)


def test_rows_whose_end_nothing_tells():
    model, _ = build(zoo.MODELS["retnet"], "sequence_classifier")
    with pytest.raises(ValueError, match="where each of 3 rows ends, got neither; pass attention"):
        model(IDS)
    assert model(IDS[:1]).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="where each of 3 rows ends"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))


@every_head
def test_halves_have_losses_in_float32(head):
    model, _ = build(zoo.MODELS["retnet"], head)
    labels = {
        "sequence_classifier": {"labels": torch.tensor([0, 1, 2])},
        "token_classifier": {"labels": IDS % 3},
        "question_answerer": {
            "start_positions": torch.tensor([4, 0, 1]),
            "end_positions": torch.tensor([5, 2, 1]),
        },
    }[head]
    output = model.bfloat16()(IDS, attention_mask=MASK, **labels)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
