"""One of several processes that ask for what slices do not do, and for a few things they do.

python tests/parallel/refusals.py RANK SIZE STORE OUT

Writes a line of JSON for each to OUT, from each process: the message of the ValueError, or what
was found.
"""

import copy
import pickle
import tempfile

import torch
import torch.distributed as dist
from as_process import run_as_process
from slices import say, write
from torch import nn

import zoo
from zoo.contract.subject import TINY
from zoo.core.parallel import split_batch

IDS = torch.arange(1, 25).view(2, 12)
MASK = torch.ones_like(IDS)
ASKED = {}


def asked(function):
    """Has it run: (model, rank, size)."""
    ASKED[function.__name__] = function
    return function


def head(name):
    """A RetNet with another head, which is one of several processes."""
    architecture = zoo.MODELS["retnet"]
    torch.manual_seed(0)
    model = getattr(architecture, name)(architecture.config(**TINY)).double()
    model.base_model.sequence_parallel = dist.group.WORLD
    return model


@asked
def labels_that_are_not_shifted(model, rank, size):
    return model(IDS, labels=IDS)


@asked
def boundaries_that_are_not_positions(model, rank, size):
    return model(IDS[:1], cu_seq_lens_q=torch.tensor([0, 5, 12]))


@asked
def a_mask_of_the_whole_row(model, rank, size):
    return model(IDS[:, :6], attention_mask=MASK)


@asked
def other_rows(model, rank, size):
    return model(IDS[: 1 + rank])


@asked
def positions_of_one(model, rank, size):
    return model(IDS, position_ids=None if rank else torch.arange(12).expand(2, 12))


@asked
def a_state_from_before(model, rank, size):
    model.base_model.sequence_parallel = None
    cache = model(IDS, use_cache=True).past_key_values
    model.base_model.sequence_parallel = dist.group.WORLD
    return model(IDS, past_key_values=cache)


@asked
def replay(model, rank, size):
    model.base_model.replay_segment_length = 5
    try:
        return model.train()(IDS)
    finally:
        model.base_model.replay_segment_length = None


@asked
def generate(model, rank, size):
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=1, pad_token_id=0)


@asked
def exported(model, rank, size):
    return torch.export.export(model.eval(), (), {"input_ids": IDS, "use_cache": False})


@asked
def compiled(model, rank, size):
    return torch.compile(model, backend="eager", fullgraph=True)(IDS, use_cache=False)


@asked
def compiled_in_pieces(model, rank, size):
    """What is exchanged is not, and the rest is."""
    own = split_batch({"input_ids": IDS}, rank, size)
    compiled = torch.compile(model, backend="eager")
    logits = [run(**own, use_cache=False).logits for run in (compiled, compiled, model)]
    return {"error": max(float((x - logits[2]).abs().max()) for x in logits[:2])}


@asked
def classes_of_texts(model, rank, size):
    return head("sequence_classifier")(IDS, attention_mask=MASK)


@asked
def answers(model, rank, size):
    where = torch.tensor([1, 2])
    return head("question_answerer")(IDS, start_positions=where, end_positions=where)


@asked
def classes_of_tokens(model, rank, size):
    """Each has its own."""
    model = head("token_classifier")
    own = split_batch({"input_ids": IDS}, rank, size)["input_ids"]
    logits = model(own).logits
    model.base_model.sequence_parallel = None
    expected = model(IDS).logits[:, 6 * rank : 6 * rank + 6]
    return {"error": float((logits - expected).abs().max())}


@asked
def copies(model, rank, size):
    """Are of one process: a group can be neither copied nor saved."""
    group = model.base_model.sequence_parallel
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    if rank == 0:  # transformers saves there alone
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            others.append(type(model).from_pretrained(folder))
    assert group is not None and model.base_model.sequence_parallel is group
    assert all(x.base_model.sequence_parallel is None for x in others)
    expected, *rest = (x(IDS).logits for x in others)
    return {"error": max(float((x - expected).abs().max()) for x in rest)}


def main(rank, size, out):
    """Asks for all of them."""
    architecture = zoo.MODELS["retnet"]
    torch.manual_seed(0)
    model = architecture.causal_lm(architecture.config(**TINY))
    assert not any(isinstance(x, nn.Dropout) and x.p for x in model.modules())
    for name, function in ASKED.items():
        say(name)
        model.base_model.sequence_parallel = dist.group.WORLD
        try:
            found = function(model, rank, size)
            found = found if isinstance(found, dict) else {"passed": True}
        except (ValueError, torch._dynamo.exc.Unsupported) as error:
            found = {"message": str(error)}
        write(out, name, f"process {rank}", size, found)
        dist.barrier()


if __name__ == "__main__":
    run_as_process(main)
