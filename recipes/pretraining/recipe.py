"""A recipe: everything that defines a pretraining run, from TOML plus `--key value`."""

import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

from .position_skip import check_position_skip
from .source_tables import NOT_OF_A_TASK, check_schedule, check_sources, settle_task
from .usage import UsageError, nearest, read_toml, tomllib


@dataclass
class Recipe:
    """One pretraining run. A token is one id of the tokenizer, a window sequence_length tokens.

    The lines below are also what --help shows, under their headings.
    """

    # The model
    name: str  # the run is written to output_dir/name
    architecture: str  # a key of zoo.MODELS
    model: dict = field(default_factory=dict)  # the fields of that architecture's config
    init_from: str = ""  # weights and config to begin with: a model's folder or Hub id
    lora: dict = field(default_factory=dict)  # train adapters on these weights: keys in lora.py
    tokenizer: str = "tokenizers/byte"  # folder (also relative to the repository) or Hub id

    # Text
    data: str = "stdlib"  # or a file, a folder of files of one kind (readers.py), a Hub id
    data_config: str = ""  # the configuration of a Hub data set; files have none
    data_split: str = "train"  # the split of it that is divided into train and held-out documents
    text_column: str = "text"
    streaming: bool = False  # read and tokenised while it is trained on, not into a cache before
    sources: list[dict] = field(default_factory=list)  # name, data, weight ...: in place of `data`
    task: dict = field(default_factory=dict)  # in place of text: name and settings (recipes/tasks)
    held_out: float = 0.05  # fraction of the documents; of each one's bytes if fewer than 20
    packing: str = "concat"  # or "documents": the state is reset where a document begins
    carry_state: bool = False  # a batch's rows go on where they stopped, states and all
    cache_dir: str = ""  # tokenised corpora; empty: output_dir/.corpus
    tokenising_workers: int = 0  # processes; 0: each physical core for 32 MB or more; 1: no others

    # Steps
    sequence_length: int = 1024  # tokens
    context_schedule: list[list] = field(default_factory=list)  # [step, shorter windows from it on]
    position_skip: dict = field(default_factory=dict)  # PoSE; scale RoPE too: position_skip.py
    attention_shift_groups: int = 0  # tokens that full attention trains in (S2-Attn); 0: all
    cross_batch_range: int = 0  # windows before its own that LongLLaMA trains on; 0: its document's
    batch_size: int = 32  # windows per step, over all processes
    micro_batch_size: int = 0  # windows a process runs at once; 0: its whole share of the batch
    steps: int = 1000
    seed: int = 0

    # Optimizer
    learning_rate: float = 1e-3  # peak
    schedule: str = "wsd"  # or "cosine", "constant"; all of them warm up
    warmup_steps: int = 100
    decay_steps: int = 200  # "wsd": the last steps, falling as 1 - sqrt(progress)
    min_learning_rate: float = 0.0  # fraction of the peak that the schedule ends at
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    learning_rate_scales: dict = field(default_factory=dict)  # parameters' names (*) -> factor
    weight_decay: float = 0.1  # per unit of learning rate; matrices alone decay
    gradient_clip: float = 1.0  # l2 norm over all parameters; 0: not clipped
    z_loss: float = 0.0  # factor of the mean log^2 Z in the loss, Z the softmax's denominator
    skip_spikes: float = 0.0  # leave steps out with so many times the usual loss or gradient; 0: no
    max_skipped: int = 10  # steps left out in a row that end the run as diverged
    ema_decay: float = 0.0  # of an average of the weights, evaluated and saved beside them; 0: none

    # Computing
    precision: str = "auto"  # "bf16" autocast, "fp32"; or the faster one, measured on CPUs
    cpu_threads: int = 0  # per process; 0: every physical core, shared by this machine's processes
    gradient_checkpointing: bool = False
    replay_segment_length: int = 0  # tokens whose activations exist at once; 0: all (exact)
    loss_chunk_size: int = 1024  # tokens whose logits exist at once; 0: all of them
    sequence_parallel: int = 1  # processes that hold each window together, a slice of it each

    # Measuring
    eval_every: int = 200  # steps; 0: at the end alone
    eval_bytes: int = 1_000_000  # held out at most, the rest is trained on; 0: no limit
    eval_batch_size: int = 8  # windows a process runs at once
    eval_positions: int = 0  # parts of a window of which each one's loss is measured too; 0: none
    eval_lengths: list[int] = field(default_factory=list)  # other context lengths to measure at
    eval_contexts: list[int] = field(default_factory=list)  # lengths with the same targets for all
    sample_prompts: list[str] = field(default_factory=list)  # continued at every evaluation
    sample_tokens: int = 120
    log_every: int = 10  # steps between lines in metrics.jsonl
    peak_flops: float = 0.0  # of a device per second, for "mfu"; 0: as known for its name

    # Saving
    checkpoint_every: int = 200  # steps; 0: at the end alone
    keep_checkpoints: int = 2  # the newest so many
    async_checkpoints: bool = False  # FSDP2: shards are written while training goes on
    trackers: list[str] = field(default_factory=list)  # "tensorboard", "trackio", "wandb", ...
    output_dir: str = "runs"

    def __post_init__(self):
        """Checks ranges and choices.

        Raises:
            UsageError: a value that no run could use.
        """
        try:
            if self.task:
                settle_task(self)
            else:
                check_sources(self.sources, self.data)
            check_schedule(self.context_schedule, self.sequence_length, self.steps, self.task)
        except ValueError as error:
            raise UsageError(str(error)) from None
        choices = {
            "packing": ("concat", "documents"),
            "schedule": ("wsd", "cosine", "constant"),
            "precision": ("auto", "fp32", "bf16"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                known = ", ".join(repr(choice) for choice in allowed)
                raise UsageError(f"{key} is one of {known}, got {getattr(self, key)!r}.")
        positive = "sequence_length batch_size steps learning_rate log_every keep_checkpoints"
        positive += " epsilon eval_batch_size max_skipped sequence_parallel"
        for key in positive.split():
            if not 0 < getattr(self, key) < math.inf:
                raise UsageError(f"{key} must be positive, got {getattr(self, key)}.")
        at_least_zero = "micro_batch_size seed warmup_steps decay_steps weight_decay gradient_clip"
        at_least_zero += " cpu_threads loss_chunk_size eval_every eval_bytes sample_tokens"
        at_least_zero += (
            " replay_segment_length tokenising_workers z_loss eval_positions peak_flops"
        )
        for key in (at_least_zero + " checkpoint_every").split():
            if not 0 <= getattr(self, key) < math.inf:
                raise UsageError(f"{key} must not be negative, got {getattr(self, key)}.")
        for name, factor in self.learning_rate_scales.items():
            if type(factor) not in (int, float) or not 0 <= factor < math.inf:
                raise UsageError(
                    f"learning_rate_scales.{name} is a factor of at least 0, got {factor!r}."
                )
        for key in ("beta1", "beta2", "min_learning_rate", "held_out", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"{key} is a fraction in [0, 1), got {getattr(self, key)}.")
        if self.eval_bytes == 0 and (
            self.streaming or any(s.get("streaming") for s in self.sources)
        ):
            raise UsageError(
                "eval_bytes limits what is held out of a stream, whose end is not known; give one "
                "above 0."
            )
        if self.held_out == 0:
            raise UsageError(
                "held_out is a fraction above 0: without such text nothing is measured."
            )
        self._check_carrying()
        check_position_skip(self)
        self._check_groups()
        self._check_cross_batch()
        self._check_slices()
        if self.eval_positions > self.sequence_length:
            raise UsageError(
                "eval_positions are parts of a window, sequence_length = "
                f"{self.sequence_length} at most, got {self.eval_positions}."
            )
        for key in ("eval_lengths", "eval_contexts"):
            if not all(length > 0 for length in getattr(self, key)):
                raise UsageError(f"{key} are numbers of tokens, got {getattr(self, key)}.")
        if self.skip_spikes and not 1 < self.skip_spikes < math.inf:
            raise UsageError(
                "skip_spikes is a factor above 1 on the median, or 0 to leave no step out, got "
                f"{self.skip_spikes}."
            )
        decay = self.decay_steps if self.schedule == "wsd" else 0
        if self.warmup_steps + decay > self.steps:
            raise UsageError(
                "warmup_steps + decay_steps must fit into steps, got "
                f"{self.warmup_steps} + {decay} > {self.steps}; shorten them or train longer."
            )
        is_folder_name = self.name and not set(self.name) & set("/\\\0")
        # With a dot in front it would be this folder, the one above, or a hidden one as .corpus is.
        if not is_folder_name or self.name.startswith("."):
            raise UsageError(
                "name is the name of a folder, without slashes and without a dot in front, got "
                f"{self.name!r}."
            )

    def _check_groups(self):
        size, length = self.attention_shift_groups, self.sequence_length
        if size < 0 or size >= length:
            raise UsageError(
                f"attention_shift_groups are parts of a window of {length} tokens, got {size}; "
                f"take a quarter, {length // 4}, or 0 for full attention."
            )
        if size and self.replay_segment_length:
            raise UsageError(
                "attention_shift_groups and replay_segment_length both cut a text to save memory, "
                "and segments go on with full attention; leave out one of them."
            )

    def _check_cross_batch(self):
        if self.cross_batch_range < 0:
            raise UsageError(
                f"cross_batch_range is a number of windows, got {self.cross_batch_range}; 0 is no "
                "crossbatch."
            )
        if self.cross_batch_range and self.replay_segment_length:
            raise UsageError(
                "cross_batch_range takes whole texts, and replay_segment_length cuts them; leave "
                "out one of them."
            )

    def _check_slices(self):
        if self.sequence_parallel == 1:
            return
        others = {
            "replay_segment_length": "which cuts a text in time (use gradient_checkpointing)",
            "carry_state": "whose states would have to go back to the first slice",
            "attention_shift_groups": "whose groups would be cut",
            "cross_batch_range": "which hands memories from text to text",
        }
        for key, why in others.items():
            if getattr(self, key):
                raise UsageError(
                    f"sequence_parallel cuts a text over processes, got it with {key}, {why}; "
                    "leave out one of them."
                )
        shortest = min([self.sequence_length, *(length for _, length in self.context_schedule)])
        if shortest < self.sequence_parallel:
            raise UsageError(
                f"sequence_parallel = {self.sequence_parallel} wants texts of at least as many "
                f"tokens, got {shortest}; use fewer processes for each."
            )

    def _check_carrying(self):
        needs = {
            'packing = "documents"': self.packing == "documents",
            "gradient_checkpointing = false (replay_segment_length saves memory)": (
                not self.gradient_checkpointing
            ),
            "no context_schedule": not self.context_schedule,
            "no position_skip (it is for windows that begin anew)": not self.position_skip,
            "no attention_shift_groups (they are of whole texts)": not self.attention_shift_groups,
            "no cross_batch_range (it is for whole texts)": not self.cross_batch_range,
            "one text, no sources": not self.sources,
            "a text that is read whole, no streaming": not self.streaming,
        }
        for need, met in needs.items():
            if self.carry_state and not met:
                raise UsageError(f"carry_state needs {need}; change it, or leave carry_state out.")

    @property
    def run_dir(self):
        """The folder that the run is written to."""
        return Path(self.output_dir) / self.name

    @property
    def corpus_dir(self):
        """The folder of tokenised corpora."""
        return self.cache_dir or os.path.join(self.output_dir, ".corpus")

    def windows_per_process(self, num_processes):
        """Windows one process runs at once, and how many times per step.

        Args:
            num_processes: in all; `sequence_parallel` of them have the same windows.

        Raises:
            UsageError: `batch_size` cannot be shared out evenly.
        """
        num_groups = num_processes // self.sequence_parallel
        size = self.micro_batch_size or self.batch_size // num_groups
        accumulation, rest = divmod(self.batch_size, max(size, 1) * num_groups)
        if rest or accumulation == 0:
            whose = "processes" + " / sequence_parallel" * (self.sequence_parallel > 1)
            raise UsageError(
                f"batch_size must be a multiple of micro_batch_size x {whose}, got "
                f"{self.batch_size} and {size} x {num_groups}; change one of them."
            )
        return size, accumulation

    def sequence_length_at(self, step):
        """Tokens of the windows that a step trains on, or of a task's examples.

        Of windows there are `batch_size` x `sequence_length` tokens in all, and so the more the
        shorter they are; of a task's examples always `batch_size`.
        """
        lengths = [length for first, length in self.context_schedule if first <= step]
        return lengths[-1] if lengths else self.sequence_length

    def tokens_until(self, step):
        """Tokens of the steps before one."""
        if not (self.task and self.context_schedule):
            return step * self.batch_size * self.sequence_length
        ends = [*(first for first, _ in self.context_schedule[1:]), step]
        return self.batch_size * sum(
            max(0, min(end, step) - first) * length
            for (first, length), end in zip(self.context_schedule, ends)
        )

    def learning_rate_at(self, step):
        """The learning rate of a step, counted from 0.

        Unlike transformers' schedules, warmup ends its first step above zero (a first step at zero
        trains nothing) and the last step is one step short of the final value.
        """
        return self.learning_rate * self._schedule(step)

    def _schedule(self, step):
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        decay_steps = self.decay_steps if self.schedule == "wsd" else self.steps - self.warmup_steps
        if step < self.steps - decay_steps:
            return 1.0
        progress = min((step - self.steps + decay_steps) / max(decay_steps, 1), 1.0)
        if self.schedule == "wsd":
            shape = 1 - math.sqrt(progress)  # Haegele et al. 2024, https://arxiv.org/abs/2405.18392
        else:
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_learning_rate + (1 - self.min_learning_rate) * shape


def describe_keys():
    """The keys of a recipe under their headings, with defaults, for --help."""
    text = Path(__file__).read_text(encoding="utf-8")
    source, lines = text.partition("class Recipe:")[2].partition("    def ")[0], []
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            lines.append(f"\n{heading[1]}:")
        elif key := re.fullmatch(r"    (\w+): ([^=#]+?)(?: = (.+?))?(?:  # (.+))?", line):
            name, kind, default, meaning = key.groups()
            name += ".KEY" if kind == "dict" else ""
            default = "" if not default or default.startswith("field(") else default
            lines.append(f"  --{name:24} {default:12} {meaning or ''}".rstrip())
    return "\n".join(lines)


def read_recipe(path, overrides=()):
    """Reads a TOML file and applies overrides.

    Args:
        path: the file. Its stem is the run's name unless it says otherwise.
        overrides: command-line words: `--key value`, `--key=value`, `--model.key value`.

    Raises:
        UsageError: no such file, not TOML, an unknown key, a value of the wrong type or range.
    """
    values = read_toml(path)
    values.setdefault("name", Path(path).stem)
    types = typing.get_type_hints(Recipe)
    for key, text in pairs(overrides):
        table, _, entry = key.partition(".")
        if entry and types.get(table) is dict:
            values.setdefault(table, {})[entry] = parse_value(text)
        else:
            values[key] = text if types.get(key) is str else parse_value(text)
    return make_recipe(values, path)


def make_recipe(values, source):
    """A recipe from the values of its keys.

    Args:
        values: key -> value, as TOML has them.
        source: where they are from, for messages.

    Raises:
        UsageError: an unknown key, a value of the wrong type or range, no architecture.
    """
    values, types = dict(values), typing.get_type_hints(Recipe)
    if "sources" in values:
        values.setdefault("data", "")
    if values.get("task"):
        for key, value in NOT_OF_A_TASK.items():
            values.setdefault(key, value)
    for key, value in values.items():
        if key not in types:
            raise UsageError(f"unknown recipe key {key!r}: {nearest(key, types)}")
        values[key] = typed(key, value, types[key])
    if "architecture" not in values:
        raise UsageError(
            f"{source} names no architecture; add a line such as architecture = 'retnet'."
        )
    return Recipe(**values)


def pairs(words):
    """(key, text) of each `--key text` or `--key=text`.

    Raises:
        UsageError: something else.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"expected --key value, got {word!r}.")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise UsageError(f"--{key} needs a value: --{key} VALUE.")
            value = words.pop(0)
        yield key.replace("-", "_"), value


def parse_value(text):
    """What a word of the command line means: a value as TOML writes it, else the word itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def typed(key, value, expected):
    """The value if it is of the expected type, or can stand for one.

    Raises:
        UsageError: it cannot.
    """
    if expected is float and type(value) is int:
        return float(value)
    if typing.get_origin(expected) is list:
        (kind,) = typing.get_args(expected)
        if type(value) is kind is not list:
            value = [value]  # one word or number stands for a list
        if kind is float and isinstance(value, list):
            value = [float(item) if type(item) is int else item for item in value]
        good = isinstance(value, list) and all(type(item) is kind for item in value)
        described = {str: "a list of strings", dict: "a list of tables", list: "a list of lists"}
        described = {**described, int: "a list of whole numbers", float: "a list of numbers"}[kind]
    else:
        good = type(value) is expected
        described = {int: "a whole number", float: "a number", bool: "true or false"}.get(
            expected, {str: "a string", dict: "a table"}.get(expected)
        )
    if not good:
        raise UsageError(f"{key} is {described}, got {value!r}.")
    return value
