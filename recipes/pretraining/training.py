"""The training loop: a `Run` steps, measures, and saves."""

import dataclasses
import math
import signal
import time

import torch

from .agreeing import together
from .averaging import Average
from .building import build_model, parameter_groups, tokenizer_of
from .carrying import CARRIED, Carried, Lanes
from .checkpointing import SHARDS_INDEX, UNFINISHED, files_in, list_checkpoints, move_into
from .comparing import check_lengths
from .costs import peak_flops, peak_memory, training_flops
from .evaluating import held_out_report, step_figures
from .full_attention import settle_full_attention
from .lora import adapt
from .measuring import diagnostics
from .mixing import Batches, load_mixture
from .precision import Precision
from .recipe import UsageError
from .recording import Records
from .reporting import Progress, duration
from .run_folder import TRACKED
from .saving import Saver
from .sharding import prepare, run_in_bf16
from .skipping import Spikes
from .slicing import decoder_of, group_of, share_of
from .starting import beginning
from .stepping import (
    accumulate_gradients,
    order_hash,
    seed_generators,
    settle_buckets,
    step_seed,
)
from .synthetic import TaskBatches, load_task, sum_stacked
from .zero import Zero, is_zero


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


def load_text(recipe, checkpoint):
    """Tokenizer, beginning and corpus of a recipe, and what identifies text and weights."""
    tokenizer = tokenizer_of(recipe)
    begin = beginning(recipe, tokenizer, checkpoint, recipe.corpus_dir)
    corpus = load_task(recipe, tokenizer) if recipe.task else load_mixture(recipe, tokenizer)
    weights = begin.record["sha256"] if begin.record else {}
    return (tokenizer, begin, corpus), {**identity(corpus), "weights": weights}


def identity(corpus):
    """What a checkpoint and all processes have to share of a corpus."""
    return {"corpus": corpus.record["sha256"], "tokenizer": corpus.record["tokenizer_sha256"]}


class Run:
    """A training run in progress.

    Args:
        recipe: what to train.
        accelerator: of accelerate.
        threads: of this process, unless the checkpoint says how many it had.
        checkpoint: what to continue.
        changes: what the recipe changes of the run from there on, for the record.
        precision: a `Precision`, by default of float32.
    """

    def __init__(self, recipe, accelerator, threads, checkpoint, changes=(), precision=None):
        self.recipe, self.accelerator = recipe, accelerator
        self.is_main = accelerator.is_main_process
        decided = precision or Precision("fp32")
        self.precision, self.precision_seconds = decided.name, decided.seconds
        self.checkpoint, self.changes = checkpoint, changes
        self.size, self.accumulation = recipe.windows_per_process(accelerator.num_processes)
        self.tokenizer, begin, self.corpus = together(load_text, recipe, checkpoint)
        self.init_from = {"init_from": begin.record} if begin.record else {}
        if recipe.task:
            self.windows = TaskBatches(recipe, self.corpus.task)
        else:
            reading = Lanes if recipe.carry_state else Batches
            self.windows = reading(recipe, self.corpus.parts)
        folder, manifest = checkpoint.folder, checkpoint.manifest
        if folder:
            self._check_same_text()
        self.step, self.seconds = checkpoint.step, manifest.get("seconds", 0.0)
        # The order of summation, and so the last bit, depends on the number of threads.
        self.threads = threads if recipe.cpu_threads else manifest.get("cpu_threads", threads)
        torch.set_num_threads(self.threads)

        # Shards are loaded into the model when it is itself in shards.
        is_sharded = folder and (folder / SHARDS_INDEX).is_file()
        model = build_model(recipe, begin.config, None if is_sharded else begin.folder)
        check_lengths(recipe, model, self.corpus)
        settle_full_attention(recipe, model)
        if recipe.task:
            sum_stacked(model)
        model = adapt(model, recipe, folder, accelerator)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lengths = {recipe.sequence_length, *(length for _, length in recipe.context_schedule)}
        self.flops = {length: training_flops(model, length) for length in lengths}
        self.peak_flops = peak_flops(recipe, accelerator.device, self.precision)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe),
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self._prepare(model)
        group = group_of(recipe.sequence_parallel, accelerator)
        decoder_of(self._bare_model()).sequence_parallel = group
        self.share = share_of(accelerator, self._bare_model())
        self.spikes = Spikes(recipe.skip_spikes, manifest.get("spikes"))
        self.average = Average(self._bare_model(), recipe.ema_decay)
        self.saver = Saver(
            recipe,
            accelerator,
            self.average,
            self.optimizer.optimizer,
            self.tokenizer,
            self.zero,
        )
        self.carried = None
        if recipe.carry_state:
            self._prepare_carrying()
        if folder:
            self.saver.load(folder)
            self.windows.restore(folder)
        compiled = f", compiled by {self._compiler()}" if self._compiler() else ""
        slices = f" ({self.share.size} to a window)" if self.share.size > 1 else ""
        accelerator.print(
            f"{self.title()}, {accelerator.num_processes} x {accelerator.device.type}{slices}, "
            f"{self.threads} threads, {self.precision}{compiled}\n"
            f"{self.windows.described(self._tokens(recipe.steps))}"
        )
        if recipe.position_skip:
            accelerator.print(f"Positions jump, below {recipe.position_skip['target']:,}")
        if recipe.attention_shift_groups:
            size = recipe.attention_shift_groups
            accelerator.print(f"Full attention trains in groups of {size:,} tokens")
        if recipe.cross_batch_range:
            accelerator.print(f"Memory layers train on {recipe.cross_batch_range} windows before")
        if begin.record and not folder:
            changed = "; ".join(begin.record["changed"])
            accelerator.print(
                f"It begins with the weights in {recipe.init_from}{changed and ', but '}{changed}"
            )

    def _prepare(self, model):
        accelerator, bf16, self.zero = self.accelerator, self.precision == "bf16", None
        if is_zero(accelerator):
            if bf16:
                run_in_bf16(model, accelerator.device)
            self.zero = Zero(accelerator, model, self.optimizer, self.recipe)
            self.model, self.optimizer = self.zero.engine, self.zero.wrapped
        else:
            self.model, self.optimizer = prepare(accelerator, model, self.optimizer, bf16)

    def _prepare_carrying(self):
        accelerator, model = self.accelerator, self._bare_model()
        if not model.has_constant_state:
            raise UsageError(
                "carry_state hands a state of constant size from step to step, and that of this "
                f"{self.recipe.architecture} grows with the text; give it a window, or leave "
                "carry_state out."
            )
        rank, world = accelerator.process_index, accelerator.num_processes
        self.carried = Carried(model.config, rank, world, self.size, self.accumulation)
        if self.checkpoint.folder:
            saved = torch.load(self.checkpoint.folder / CARRIED, weights_only=True)
            if saved:
                self.carried.take_up(saved, accelerator.device)

    def _check_same_text(self):
        changed = [
            f"the {name} is another: {self.checkpoint.manifest[name][:8]} -> {value[:8]}"
            for name, value in identity(self.corpus).items()
            if value != self.checkpoint.manifest[name]
        ]
        if changed:
            raise UsageError(
                f"{self.checkpoint.folder} was trained otherwise ({'; '.join(changed)}; earlier "
                "versions identified and divided text otherwise); undo the change, or start a new "
                "run with --name."
            )

    def _bare_model(self):
        """The model in none of accelerate's and torch.compile's wrappers, which rename weights."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _compiler(self):
        backend = self.accelerator.state.dynamo_plugin.backend.value.lower()
        return None if backend == "no" else backend

    def _tokens(self, steps):
        return self.recipe.tokens_until(steps)

    def train(self, signals):
        """Runs the steps that are left.

        Args:
            signals: a `StopSignals`, which may end it early.

        Returns:
            The signal that ended it early, or None.

        Raises:
            Diverged: the loss or the gradient is not finite; nothing was saved since.
        """
        if self.is_main:
            self.records = Records(self.recipe, self.checkpoint, self._about(), self.corpus.record)
            if self.changes:
                self.records.write("change", self._now(), {"changes": self.changes})
            self.records.save()
            self.progress = Progress(self.step, self.recipe.steps)
        self._start_trackers()
        try:
            return self._run_steps(signals)
        except Diverged:
            if self.is_main:
                self.records.diverged.append(self.step + 1)
                self.records.save()
            raise

    def _about(self):
        return {
            "parameters": self.num_parameters,
            "trained_parameters": self.num_trained,
            "training_flops_per_token": self.flops[self.recipe.sequence_length],
            "peak_memory_is": peak_memory(self.accelerator.device)[1],
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "precision": self.precision,
            "precision_seconds": self.precision_seconds,
            "compiler": self._compiler(),
            "cpu_threads": self.threads,
            "order_sha256": order_hash(self.windows, self.recipe),
            **self.init_from,
        }

    def _run_steps(self, signals):
        recipe = self.recipe
        logged, logged_seconds = self.step, self.seconds
        if self.step < recipe.steps:
            settle_buckets(self.accelerator, self.model, self._batches)
        while self.step < recipe.steps:
            began = time.perf_counter()
            loss, norm, rate = self._train_step()
            self.seconds += time.perf_counter() - began
            last = self.step == recipe.steps
            stopped = self._of_any_process(signals.received or 0)
            if self.step % recipe.log_every == 0 or last:
                tokens = self._tokens(self.step) - self._tokens(logged)
                speed = tokens / (self.seconds - logged_seconds)
                logged, logged_seconds = self.step, self.seconds
                if not self.spikes.in_a_row:  # of one that was skipped there is a line already
                    self._log_step(loss, norm, rate, speed)
            if last or (recipe.eval_every and self.step % recipe.eval_every == 0):
                self.evaluate()
            due = recipe.checkpoint_every and self.step % recipe.checkpoint_every == 0
            if due or last or stopped:
                self.save_checkpoint()
            if stopped and not last:
                self.saver.wait()
                return signal.Signals(stopped)
        self.saver.wait()
        return None

    def _of_any_process(self, number):
        """The largest number that any process has."""
        # All processes leave after the same step, or those left behind would wait forever.
        number = torch.tensor([int(number)], device=self.accelerator.device)
        return self.accelerator.gather(number).max().item()

    def _batches(self):
        """This process's micro-batches of the step."""
        share = self.share
        return [
            share.cut(self.windows.batch(self.step, share.rank, micro, share.world, self.size))
            for micro in range(self.accumulation)
        ]

    def _train_step(self):
        recipe, accelerator = self.recipe, self.accelerator
        # Dropout draws from a generator of this step's own, so there is no state of it to restore.
        seed = step_seed(recipe.seed, self.step, accelerator.process_index)
        seed_generators(seed, accelerator.device)
        rate = recipe.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batches = self._batches()
        backward = self.zero and self.zero.backward
        if self.carried and self.windows.begins(self.step):
            self.carried.empty()
        loss = accumulate_gradients(accelerator, self.model, batches, backward, self.carried).item()
        if self.zero:  # whose norm comes with the update
            norm = self.zero.step() if math.isfinite(loss) else math.nan
        else:
            largest = recipe.gradient_clip or math.inf
            norm = float(accelerator.clip_grad_norm_(self.model.parameters(), largest))
        skipped = self.spikes.reason(accelerator, loss, norm)
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if not (is_finite or skipped) or self.spikes.in_a_row >= recipe.max_skipped:
            where = "there is no checkpoint yet, so begin again with --overwrite"
            for _, folder in list_checkpoints(recipe.run_dir)[-1:]:
                where = f"{folder} is kept, continue from it with --resume"
            raise Diverged(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; stopped before the "
                f"update{self.spikes.said()}; {where} and a lower --learning_rate (it is "
                f"{recipe.learning_rate:g}), more --warmup_steps or a smaller --gradient_clip."
            )
        if not skipped:
            self.optimizer.step()
            self.average.update()
        self.optimizer.zero_grad()
        self.step += 1
        if skipped:
            self._note_skipped(skipped)
            if self.carried and not is_finite:
                self.carried.empty()  # nor are the states, and all after them would not be
        return loss, norm, rate

    def _note_skipped(self, reason):
        if self.is_main:
            where = self.windows.position(self.step - 1)
            self.records.write("skipped", self._now(), {"reason": reason, **where})
            self.progress.say(f"step {self.step} skipped: {reason}")

    def _log_step(self, loss, norm, rate, speed):
        watched = diagnostics(self.accelerator, self.model)
        if self.is_main:
            figures = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
            self._record("train", {**step_figures(self, loss, speed), **figures, **watched})
            self.progress.update(self.step, loss, speed)

    def _now(self):
        return {"step": self.step, "tokens": self._tokens(self.step), "seconds": self.seconds}

    def _record(self, kind, figures):
        self.records.write(kind, self._now(), figures)
        tracked = {f"{kind}/{name}": value for name, value in figures.items()}
        self.accelerator.log(tracked, step=self.step)

    def evaluate(self):
        """Measures held-out bits per byte or accuracy, draws the curve, prints samples."""
        # In every process: where weights are in shards, each layer is gathered from all of them.
        figures, lines = held_out_report(self)
        if self.is_main:
            self._record("held_out", figures)
            for line in lines:
                self.progress.say(line)
            self.records.draw(self.title())
        self.accelerator.wait_for_everyone()

    def title(self):
        """One line that says what was trained."""
        trained = (
            "" if self.num_trained == self.num_parameters else f", {self.num_trained:,} trained"
        )
        what = f"{self.recipe.name}: {self.recipe.architecture}"
        return f"{what}, {self.num_parameters:,} parameters{trained}"

    def save_checkpoint(self):
        """Writes everything that `--resume` needs."""
        recipe = dataclasses.asdict(self.recipe)
        facts = {"seconds": self.seconds, "cpu_threads": self.threads, "recipe": recipe}
        facts |= {"precision": self.precision, "precision_seconds": self.precision_seconds}
        facts |= identity(self.corpus) | self.init_from | self.spikes.state()
        states = self.carried.gathered() if self.carried else None

        def write_beside(folder):
            self.windows.save(folder, self.step)
            if self.carried:
                torch.save(states, folder / CARRIED)

        self.saver.save(self.step, facts, self.progress.say if self.is_main else None, write_beside)

    def finish(self):
        """Puts the final model into the run's folder and completes run.json."""
        run_dir = self.recipe.run_dir
        if self._of_any_process(self.is_main and self.records.results().get("step") != self.step):
            self.evaluate()  # the line of metrics.jsonl that said it is lost
        folder = run_dir / f"final{UNFINISHED}"
        decoder_of(self._bare_model()).sequence_parallel = None  # it may be copied
        if self.is_main:
            folder.mkdir()
        self.saver.write_model(folder)
        if self.is_main:
            self.records.files = sorted({*self.records.files, *files_in(folder)})
            self.records.save()  # it names the files before they come
            move_into(folder, run_dir)
            self.progress.close()
            result = self.records.results()
            print(
                f"{run_dir}: {self.records.said_of_results()}; {result['tokens']:,} tokens in "
                f"{duration(self.seconds)}{self.records.said_of_skipped()}"
            )
        # All leave together: one that took its connections down while another is at work has been
        # seen to abort.
        self.accelerator.wait_for_everyone()
        # And after gloo's threads let go of that: one that still held it has been seen to hang.
        time.sleep(0.1 if self.accelerator.num_processes > 1 else 0)
        self.accelerator.end_training()

    def _start_trackers(self):
        recipe = self.recipe
        options = {
            "tensorboard": {"purge_step": self.step},
            "trackio": {"name": recipe.name},
            "wandb": {"name": recipe.name},
        }
        flat = {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
        self.accelerator.init_trackers(TRACKED, config=flat, init_kwargs=options)
