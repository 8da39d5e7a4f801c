"""Other libraries on exported folders, beside a tiny Llama, which tells their faults from ours.

python tests/ecosystem.py                       every architecture, every library: a table
python tests/ecosystem.py --only retnet,llama --libraries trl,peft
python tests/ecosystem.py --folders NAME=FOLDER... --libraries ...    folders that are there

Libraries are looked for in .venv/NAME beside the installed ones; one that is missing is said to be.
A folder is loaded as a user does who has no zoo: this process cannot import it.
"""

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where `make` and people put what whoever imports transformers would import too.
APART = Path(os.environ.get("ECOSYSTEM_LIBRARIES", ROOT / ".venv"))
PLACES = {
    "trl_sft": "trl",
    "trl_packed": "trl",
    "torchao": "torchao",
    "quanto": "quanto",
    "lm_eval": "lm-eval",
    "sentence_transformers": "sentence-transformers",
}
REMOTE = {"trust_remote_code": True}
TEXTS = ["def f(x):", "x", "    return y + 1\n\nclass A"]
CHECKS = {}


class Missing(Exception):
    """A library is not installed."""


def check(function):
    """Files a check by its name."""
    CHECKS[function.__name__] = function
    return function


def need(module):
    """Raises `Missing` unless a library can be imported."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # nor what it is a part of
        found = None
    if found is None:
        raise Missing(module)


def load(folder, **options):
    """The language model in a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **REMOTE | options).eval()


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **REMOTE)


def tokens(*shape, seed=0):
    import torch

    return torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(seed))


def same(found, expected, bound=1e-5):
    """Raises unless two tensors differ by no more than a share of the second's norm."""
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= bound, f"differs by {error:.2g} of its norm, expected {bound:.2g} at most"


def without_gradients(function):
    """Runs a check in torch.no_grad, which this module cannot import when it begins."""

    def run(*arguments):
        import torch

        with torch.no_grad():
            return function(*arguments)

    run.__name__ = function.__name__
    return run


@check
@without_gradients
def pipelines(folder, scratch):
    """Texts together are as texts apart, for what is written and for both kinds of classes."""
    from transformers import pipeline

    write = pipeline("text-generation", model=folder, **REMOTE)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = [x[0]["generated_text"] for x in write(TEXTS, batch_size=3, **options)]
    assert together == [write(text, **options)[0]["generated_text"] for text in TEXTS], together
    for kind, labels in (("Sequence", 3), ("Token", 5)):
        head_of(folder, kind, scratch / kind, num_labels=labels)
        task = {"Sequence": "text-classification", "Token": "token-classification"}[kind]
        classify = pipeline(task, model=scratch / kind, **REMOTE)
        for found, text in zip(classify(TEXTS, batch_size=3), TEXTS, strict=True):
            alone = classify(text)
            found, alone = ([x] if isinstance(x, dict) else x for x in (found, alone))
            found = found if kind == "Token" else found[:1]
            assert len(found) == len(alone)
            for a, b in zip(found, alone, strict=True):
                assert abs(a["score"] - b["score"]) < 1e-5, (a, b)


def head_of(folder, kind, place, **fields):
    """The folder's decoder with a new head, saved with a tokenizer and the code it came with."""
    import torch
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}Classification", None)
    auto = auto or transformers.AutoModelForQuestionAnswering
    torch.manual_seed(0)
    model = auto.from_pretrained(folder, **REMOTE | fields)
    model.save_pretrained(place)
    tokenizer_of(folder).save_pretrained(place)
    return model


@check
def trainer(folder, scratch):
    """Every head learns, evaluates, predicts, saves, and goes on as if it had not stopped."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainingArguments

    ids = tokens(12, 16)
    kinds = {
        "Sequence": lambda row: {"labels": int(ids[row, -1]) % 2},
        "Token": lambda row: {"labels": (ids[row] % 2).tolist()},
        "Question": lambda row: {"start_positions": row % 16, "end_positions": row % 16},
    }
    for kind, labels in kinds.items():
        rows = [
            {"input_ids": ids[row].tolist(), "attention_mask": [1] * 16} | labels(row)
            for row in range(12)
        ]
        losses = {}
        for name, begin in (("whole", None), ("again", True)):
            options = {} if kind == "Question" else {"num_labels": 2}
            model = head_of(folder, kind, scratch / kind / "begin", **options)
            place = scratch / kind / "run"
            arguments = TrainingArguments(
                str(place),
                max_steps=6,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                logging_steps=1,
                save_steps=3,
                eval_steps=3,
                eval_strategy="steps",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
            run = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:5])
            run.train(resume_from_checkpoint=str(place / "checkpoint-3") if begin else None)
            losses[name] = [x["loss"] for x in run.state.log_history if "loss" in x][-3:]
            evaluated = run.evaluate()["eval_loss"]
            logits = run.predict(rows[:5]).predictions
            for x in logits if isinstance(logits, tuple) else [logits]:
                assert np.isfinite(x).all() and len(x) == 5
            state = {k: v.clone() for k, v in run.model.state_dict().items()}
            losses[name].append(evaluated)
            losses[name + " weights"] = torch.cat([x.flatten() for x in state.values()])
            # A mean of labels, whatever is accumulated: chance is log 2, or log 16 of places.
            first = next(x["loss"] for x in run.state.log_history if "loss" in x)
            assert begin or 0.2 < first < (4 if kind == "Question" else 1.6), (kind, first)
        assert losses["whole"] == losses["again"], (kind, losses)
        assert torch.equal(losses["whole weights"], losses["again weights"]), kind


def sft(folder, scratch, **options):
    """A trainer of TRL after four steps on short texts."""
    need("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [f"{a} plus {b} is {a + b}." * (1 + a % 3) for a in range(6) for b in range(4)]
    arguments = SFTConfig(
        str(scratch),
        max_length=128,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    model, tokenizer = load(folder), tokenizer_of(folder)
    data = Dataset.from_list([{"text": text} for text in texts])
    run = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    run.train()
    losses = [x["loss"] for x in run.state.log_history if "loss" in x]
    assert losses[-1] < losses[0], losses
    return run


@check
def trl_sft(folder, scratch):
    """The loss falls, and padding costs nothing: the loss of a batch is that of its rows."""
    run = sft(folder, scratch, packing=False)
    _documents_apart(run, packed=False)


@check
def trl_packed(folder, scratch):
    """The loss of a packed row is that of its documents, each alone."""
    run = sft(folder, scratch, packing=True, packing_strategy="bfd")
    _documents_apart(run, packed=True)


def _documents_apart(run, packed):
    import torch

    batch = next(iter(run.get_train_dataloader()))
    model, total, count = run.model.eval(), 0.0, 0
    ids, labels = batch["input_ids"], batch["labels"]
    if packed:
        positions = batch["position_ids"][0]
        starts = (positions == 0).nonzero()[:, 0].tolist() + [len(positions)]
        assert len(starts) > 3, "nothing was packed"
        pieces = [(0, slice(a, b)) for a, b in zip(starts, starts[1:])]
    else:
        assert (batch["attention_mask"] == 0).any(), "nothing was padded"
        pieces = [(row, mask.bool()) for row, mask in enumerate(batch["attention_mask"])]
    keys = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        whole = model(**{k: batch[k] for k in keys if k in batch}).logits
        for row, part in pieces:
            alone = model(ids[row : row + 1][:, part]).logits
            target = labels[row, part]
            target[0] = -100
            same(whole[row, part], alone[0], 1e-4)
            logits = alone[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, target[1:], reduction="sum")
            count += (target[1:] != -100).sum()
        scored = {k: batch[k] for k in keys if k in batch} | {"labels": labels}
        assert abs(model(**scored).loss - total / count) < 1e-4


@check
def peft(folder, scratch):
    """LoRA learns, is saved and loaded, and merges into the weights."""
    need("peft")
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    base, ids = load(folder), tokens(2, 12)
    before = base(ids).logits.detach()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves one half of each pair, which begins as zeros
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(scratch / "adapter")
    with torch.no_grad():
        learned = model(ids).logits
        assert not torch.allclose(learned, before, atol=1e-4), "nothing was learnt"
        again = PeftModel.from_pretrained(load(folder), scratch / "adapter").eval()
        assert torch.equal(again(ids).logits, learned)
        same(again.merge_and_unload()(ids).logits, learned, 1e-4)


@check
@without_gradients
def torchao(folder, scratch):
    """Eight bits a weight, saved and loaded again, and a text is written with them."""
    need("torchao")
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    ids, expected = tokens(2, 40), load(folder)(tokens(2, 40)).logits
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    small = load(folder, quantization_config=config)
    assert any("Int8" in type(p).__name__ for p in small.parameters())
    found = small(ids).logits
    same(found, expected, 0.1)  # 0.4% of the largest weight of a row each
    small.generate(ids, max_new_tokens=3, do_sample=False)
    small.save_pretrained(scratch / "small")
    assert torch.equal(load(scratch / "small")(ids).logits, found)


@check
@without_gradients
def quanto(folder, scratch):
    """Eight bits a weight, and a text is written with them."""
    need("optimum.quanto")
    from optimum.quanto import freeze, qint8, quantization_map, quantize

    ids, expected = tokens(2, 40), load(folder)(tokens(2, 40)).logits
    small = load(folder)
    quantize(small, weights=qint8)
    freeze(small)
    assert quantization_map(small)
    same(small(ids).logits, expected, 0.1)
    small.generate(ids, max_new_tokens=3, do_sample=False)


@check
@without_gradients
def lm_eval(folder, scratch):
    """The harness gives a text the likelihood that the model's own logits give it."""
    need("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=2, **REMOTE)
    pairs = [("def f(", "x, y):"), ("class A", ":\n    pass"), ("one two", " three")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = [likelihood for likelihood, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    model, tokenizer = load(folder), tokenizer_of(folder)
    for likelihood, pair in zip(found, pairs, strict=True):
        before, after = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in pair)
        import torch

        logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
        expected = sum(logits[len(before) + i - 1, t] for i, t in enumerate(after))
        assert abs(likelihood - expected) < 1e-3, (likelihood, expected)


@check
@without_gradients
def sentence_transformers(folder, scratch):
    """Sentences become the means of their hidden states, in a batch as alone."""
    need("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoModel

    options = {"model_kwargs": REMOTE, "config_kwargs": REMOTE}
    body = models.Transformer(str(folder), **options)
    width = body.get_embedding_dimension()
    encoder = SentenceTransformer(modules=[body, models.Pooling(width)], device="cpu")
    found = encoder.encode(TEXTS, batch_size=3)
    model, tokenizer = AutoModel.from_pretrained(folder, **REMOTE).eval(), tokenizer_of(folder)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        same(torch.from_numpy(vector), hidden.mean(0))
    encoder.save(str(scratch / "encoder"))
    again = SentenceTransformer(str(scratch / "encoder"), device="cpu", **REMOTE)
    same(torch.from_numpy(again.encode(TEXTS)), torch.from_numpy(found))


@check
@without_gradients
def accelerate_dispatch(folder, scratch):
    """Blocks on a disk, the rest in memory: the same logits, in a pass and in steps."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids, expected = tokens(2, 12), load(folder)(tokens(2, 12)).logits
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, **REMOTE), **REMOTE
        )
    empty.tie_weights()
    places = {name: "cpu" for name, _ in empty.named_children()} | {
        f"model.{name}": "cpu" for name, _ in empty.model.named_children()
    }
    del places["model"], places["model.layers"]
    places |= {f"model.layers.{i}": "disk" for i in range(len(empty.model.layers))}
    model = load_checkpoint_and_dispatch(
        empty.eval(), str(folder), places, offload_folder=str(scratch / "offloaded")
    )
    assert torch.equal(model(ids).logits, expected)
    first = model(ids[:, :11], use_cache=True)
    cache = first.past_key_values
    same(model(ids[:, 11:], past_key_values=cache).logits, expected[:, 11:])
    automatic = load(folder, device_map="auto", max_memory={"cpu": "1GB"})
    assert torch.equal(automatic(ids).logits, expected)


@check
@without_gradients
def torch_export(folder, scratch):
    """A step with the state going in and out, as a program: run for some steps, as the model."""
    import torch
    from transformers import DynamicCache

    model, ids = load(folder), tokens(2, 24)

    class Step(torch.nn.Module):
        """One token, and a state as a dict of tensors for each layer."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, state):
            cache = DynamicCache()
            # Of this folder's own kinds: it is one of several here.
            cache.layers = [kind() for kind in kinds]
            for layer, held in zip(cache.layers, state, strict=True):
                put(layer, held)
            output = self.model(input_ids, past_key_values=cache, use_cache=True)
            return output.logits, [take(layer) for layer in output.past_key_values.layers]

    def put(layer, held):
        if "keys" in held:
            layer.update(held["keys"], held["values"])
        else:
            held = dict(held)
            layer.clock, layer.tensors = held.pop("clock"), held

    def take(layer):
        if getattr(layer, "keys", None) is not None:
            return {"keys": layer.keys, "values": layer.values}
        return {**layer.tensors, "clock": layer.clock}

    cache = model(ids[:, :8], use_cache=True).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    state, eager = [take(layer) for layer in cache.layers], model(ids).logits
    grows = "keys" in state[0]
    shapes = None
    if grows:
        time = {2: torch.export.Dim("T")}
        shapes = {"input_ids": None, "state": [dict.fromkeys(x, time) for x in state]}
    program = torch.export.export(
        Step(), (), {"input_ids": ids[:, 8:9], "state": state}, dynamic_shapes=shapes
    )
    torch.export.save(program, scratch / "step.pt2")
    run = torch.export.load(scratch / "step.pt2").module()
    for t in range(8, 24):
        before = copy.deepcopy(state)
        logits, after = run(input_ids=ids[:, t : t + 1], state=state)
        same(logits[:, 0], eager[:, t])
        for old, held in zip(before, state, strict=True):  # what went in is as it was
            assert all(torch.equal(held[name], x) for name, x in old.items())
        state = after


def make_folders(place, names):
    """Exports one tiny model of each architecture, and writes a Llama, in a process with zoo."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import zoo
    from zoo.hub.export import export

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "byte")
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    folders = {}
    for name in names:
        torch.manual_seed(0)
        folder = Path(place) / name
        if name == "llama":
            LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            found = zoo.MODELS[name]
            # Windows and segments shorter than the texts, where there are any.
            fields = next(iter(found.config.variants.values()), {})
            model = found.causal_lm(found.config(**sizes | fields))
            model.save_pretrained(Path(place) / "checkpoints" / name)
            tokenizer.save_pretrained(Path(place) / "checkpoints" / name)
            export(Path(place) / "checkpoints" / name, folder, license="mit")
        folders[name] = str(folder)
    return folders


def run_checks(folders, libraries, scratch):
    """{name: {library: "ok", or what went wrong}}."""
    sys.modules["zoo"] = None  # whoever imports it fails
    # Before transformers is imported, which looks for them once.
    sys.path += [str(APART / x) for name, x in PLACES.items() if name in libraries]
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    for library in libraries:
        for name, folder in folders.items():
            place = Path(scratch) / library / name
            place.mkdir(parents=True)
            try:
                CHECKS[library](Path(folder), place)
                said = "ok"
            except Missing as error:
                said = f"no {error}"
            except Exception as error:
                if os.environ.get("TRACE"):
                    traceback.print_exc()
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            results.setdefault(name, {})[library] = said
            print(f"{name:16} {library:22} {said}", file=sys.stderr, flush=True)
    return results


def main():
    """Prints a table, and the results as JSON in the last line. Returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="architectures, with commas; llama is one")
    parser.add_argument("--libraries", default="", help="with commas")
    parser.add_argument("--folders", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        import zoo

        names = [x for x in arguments.only.split(",") if x] or [*zoo.MODELS, "llama"]
        print(json.dumps(make_folders(arguments.make, names)))
        return 0
    libraries = [x for x in arguments.libraries.split(",") if x] or list(CHECKS)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_MODULES_CACHE"] = f"{scratch}/modules"
        folders = dict(x.split("=", 1) for x in arguments.folders)
        if not folders:
            made = subprocess.run(
                [sys.executable, __file__, "--make", f"{scratch}/made", "--only", arguments.only],
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            folders = json.loads(made.stdout.splitlines()[-1])
        results = run_checks(folders, libraries, Path(scratch) / "runs")
    print("| model | " + " | ".join(libraries) + " |\n|" + " --- |" * (1 + len(libraries)))
    for name, row in results.items():
        cells = [row[x] if row[x] == "ok" or row[x].startswith("no ") else "no" for x in libraries]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(json.dumps(results))
    return int(any(x != "ok" for row in results.values() for x in row.values()))


if __name__ == "__main__":
    sys.exit(main())
