"""Passkey retrieval, small: how many segments back does a model find five digits again?

    python recipes/passkey.py recipes/configs/passkey.toml --model infini_linear --seed 0
    python recipes/passkey.py recipes/configs/passkey.toml --report

After Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300, and the task in the paper of the
Infini-Transformer, with words of one token. A document is filler that repeats itself, with a key (a
marker and its digits) somewhere, and at its end a question (another marker) and the digits again.
Digits of different places are different tokens, so that what is asked for is memory alone: to tell
places apart first takes a small model longer to learn than all the rest.
The loss is that of the answer's digits alone. Documents in training have `train_segments` segments,
and where the key lies is drawn evenly over all of them. Accuracy is the share of answers with all
digits right, by distance: how many segments before the answer's the key lies. A guess is right once
in 10^5.

Every model of the TOML is trained with the same documents in the same order. Results go to
`output_dir`/<model>_<seed>.json; `--report` makes passkey.json and passkey.png of all there are.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from pretraining.building import parameter_groups
from pretraining.usage import UsageError, nearest, read_toml

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:  # run from a clone in which nothing is installed
    sys.path.insert(0, str(REPOSITORY))

import zoo  # noqa: E402

START, KEY, ASK, FIRST_DIGIT = 0, 1, 2, 3
NUM_DIGITS, NUM_FILLER = 5, 19
FIRST_FILLER = FIRST_DIGIT + 10 * NUM_DIGITS
VOCAB_SIZE = FIRST_FILLER + NUM_FILLER


@dataclass
class Task:
    """What all models of a passkey TOML share. Lengths are in tokens or in segments of them."""

    # name -> {"architecture", "learning_rate" and "learning_rate_scales" if they are its own, and
    # its config's fields}
    models: dict
    segment_length: int = 64
    train_segments: int = 4
    test_segments: tuple = (4, 8, 16, 32)
    batch_size: int = 16
    steps: int = 2000
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    learning_rate_scales: dict = field(default_factory=dict)
    gradient_clip: float = 1.0
    test_documents: int = 128  # per distance
    output_dir: str = "runs/passkey"

    def rate_at(self, step):
        """A linear warm-up, then a cosine to zero."""
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        falling = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * falling


def read_task(path):
    """A `Task` from a TOML file.

    Raises:
        UsageError: no such file, not TOML, or a key that it does not have.
    """
    values = read_toml(path)
    known = Task.__dataclass_fields__
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r} in {path}: {nearest(key, known)}")
    if not values.get("models"):
        raise UsageError(f"{path} names no models; add tables such as [models.infini_linear].")
    return Task(**values)


def documents(count, num_segments, segment_length, distances, generator):
    """Documents of a passkey task.

    Args:
        count: how many.
        num_segments: length of each.
        segment_length: tokens of a segment.
        distances: [count], segments from the key's to the answer's, below num_segments.
        generator: of random numbers.

    Returns:
        ids [count, num_segments * segment_length], of which the last `NUM_DIGITS` are the answer.
    """
    length, size = num_segments * segment_length, 1 + NUM_DIGITS
    phase = torch.randint(NUM_FILLER, (count, 1), generator=generator)
    ids = FIRST_FILLER + (torch.arange(length) + phase) % NUM_FILLER
    digits = torch.randint(10, (count, NUM_DIGITS), generator=generator)
    digits = FIRST_DIGIT + 10 * torch.arange(NUM_DIGITS) + digits
    ids[:, 0], ids[:, -size], ids[:, -NUM_DIGITS:] = START, ASK, digits
    # The key lies whole in its segment, and neither on the first token nor on the question.
    segments = num_segments - 1 - distances
    low = (segments * segment_length).clamp(min=1)
    high = torch.minimum((segments + 1) * segment_length, torch.tensor(length - size)) - size
    share = torch.rand(count, generator=generator)
    begin = low + (share * (high - low + 1)).long().minimum(high - low)
    places = begin[:, None] + torch.arange(size)
    key = torch.cat([torch.full((count, 1), KEY), digits], dim=1)
    return ids.scatter(1, places, key)


def build(task, name, seed):
    """A model of the task with fresh weights, and the task with its own learning rates.

    Raises:
        UsageError: no such model in the TOML, or fields that its architecture does not have.
    """
    if name not in task.models:
        raise UsageError(f"no model {name!r} in the TOML: {nearest(name, task.models)}")
    fields = dict(task.models[name])
    own = ("learning_rate", "learning_rate_scales")
    task = replace(task, **{key: fields.pop(key) for key in own if key in fields})
    architecture = fields.pop("architecture", None)
    if architecture not in zoo.MODELS:
        raise UsageError(
            f"{name} has architecture {architecture!r}: {nearest(str(architecture), zoo.MODELS)}"
        )
    torch.manual_seed(seed)
    architecture = zoo.MODELS[architecture]
    try:
        config = architecture.config(vocab_size=VOCAB_SIZE, **fields)
    except Exception as error:  # a strict config raises errors of huggingface_hub and of its own
        raise UsageError(f"{name}: {' '.join(str(error.__cause__ or error).split())}") from error
    return architecture.causal_lm(config), task


def answer_logits(model, ids):
    """Logits of the answer's digits, [B, NUM_DIGITS, vocab], and the digits."""
    logits = model(ids, use_cache=False, logits_to_keep=NUM_DIGITS + 1).logits
    return logits[:, :-1], ids[:, -NUM_DIGITS:]


def train(task, model, seed, log):
    """Trains a model; `log` gets a dictionary every hundred steps."""
    groups = parameter_groups(model, task)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    began, losses = time.perf_counter(), []
    for step in range(task.steps):
        shape = (task.batch_size,)
        distances = torch.randint(task.train_segments, shape, generator=generator)
        ids = documents(
            task.batch_size, task.train_segments, task.segment_length, distances, generator
        )
        logits, digits = answer_logits(model, ids)
        loss = cross_entropy(logits.flatten(0, 1).float(), digits.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = task.rate_at(step) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            figures = {"step": step + 1, "loss": sum(losses) / len(losses)}
            figures["seconds"] = round(time.perf_counter() - began, 1)
            figures |= model.diagnostics() if hasattr(model, "diagnostics") else {}
            log(figures)
            losses = []


@torch.no_grad()
def measure(task, model, seed):
    """Share of answers with all digits right, each given those before it: length -> by distance."""
    model.eval()
    # Other documents than any that were trained on.
    generator, accuracy = torch.Generator().manual_seed(10**6 + seed), {}
    for num_segments in task.test_segments:
        accuracy[num_segments] = []
        for distance in range(num_segments):
            distances = torch.full((task.test_documents,), distance)
            ids = documents(
                task.test_documents, num_segments, task.segment_length, distances, generator
            )
            right = 0
            for part in ids.split(task.batch_size):
                logits, digits = answer_logits(model, part)
                right += (logits.argmax(-1) == digits).all(-1).sum().item()
            accuracy[num_segments].append(right / task.test_documents)
    return accuracy


def run(task, name, seed):
    """Trains and measures one model, and writes what came of it."""
    model, own = build(task, name, seed)
    curve = []

    def log(figures):
        curve.append(figures)
        print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    train(own, model, seed, log)
    folder = Path(task.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "task": asdict(task) | {"models": {name: task.models[name]}},
        "curve": curve,
        "accuracy": measure(task, model, seed),
        "torch": torch.__version__,
    }
    path = folder / f"{name}_{seed}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def report(task):
    """A table and a plot of all results: mean over seeds, and the least and largest."""
    folder = Path(task.output_dir)
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*_*.json"))]
    if not records:
        raise UsageError(f"there are no results in {folder}; train models with --model first.")
    table = {}
    for name in dict.fromkeys(record["model"] for record in records):
        runs = [record for record in records if record["model"] == name]
        table[name] = {
            "parameters": runs[0]["parameters"],
            "seeds": [record["seed"] for record in runs],
            "accuracy": {
                length: [list(values) for values in zip(*(r["accuracy"][length] for r in runs))]
                for length in runs[0]["accuracy"]
            },
        }
        print(f"{name}, {runs[0]['parameters']:,} parameters, seeds {table[name]['seeds']}")
        for length, by_distance in table[name]["accuracy"].items():
            shown = (f"{sum(values) / len(values):.2f}" for values in by_distance)
            print(f"  {length:>3} segments, by distance from 0: {' '.join(shown)}")
    text = json.dumps({"models": table, "runs": records}, indent=1) + "\n"
    (folder / "passkey.json").write_text(text, encoding="utf-8")
    plot(task, table, folder / "passkey.png")


def plot(task, table, path):
    """Accuracy against distance, a panel for each length of documents; seeds are thin lines."""
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted(int(length) for length in next(iter(table.values()))["accuracy"])
    figure = Figure(figsize=(4 * len(lengths) + 1, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths):
        for name, row in table.items():
            by_distance = row["accuracy"][str(length)]
            means = [sum(values) / len(values) for values in by_distance]
            (line,) = axes.plot(range(length), means, marker="o", ms=3, label=name)
            for of_seed in zip(*by_distance):
                axes.plot(range(length), of_seed, lw=0.7, alpha=0.5, color=line.get_color())
        trained = " (as in training)" if length == task.train_segments else ""
        axes.set(ylim=(-0.02, 1.02), title=f"documents of {length} segments{trained}")
        axes.set_xlabel(f"segments of {task.segment_length} tokens between key and answer")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("answers with all five digits right")
    panels[-1].legend()
    figure.savefig(path, format="png")


def main(argv=None):
    """Runs the command line; the exit status is 2 after an error, which is printed as one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="TOML file")
    parser.add_argument("--model", help="the one to train, a table of the TOML's [models]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in place of the TOML's")
    parser.add_argument("--output_dir", help="in place of the TOML's")
    parser.add_argument("--report", action="store_true", help="table and plot of all results")
    arguments = parser.parse_args(argv)
    try:
        task = read_task(arguments.task)
        changes = {key: getattr(arguments, key) for key in ("steps", "output_dir")}
        task = replace(task, **{key: x for key, x in changes.items() if x is not None})
        if arguments.model is not None:
            run(task, arguments.model, arguments.seed)
        if arguments.report:
            report(task)
        if arguments.model is None and not arguments.report:
            raise UsageError(f"name a --model ({', '.join(task.models)}), or ask for a --report.")
    except UsageError as error:
        print(f"passkey.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
