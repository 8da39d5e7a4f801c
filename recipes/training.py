"""The training loop: a `Run` steps, measures, and saves."""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
import time

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from building import REPOSITORY, build_config, build_model, load_tokenizer, parameter_groups
from checkpointing import (
    UNFINISHED,
    list_checkpoints,
    move_into,
    newest_checkpoint,
    remove_unfinished,
    write_checkpoint,
)
from corpus import Windows, load_corpus
from launching import StopSignals
from measuring import diagnostics, held_out_bits_per_byte, sample
from recipe import UsageError, changes_history
from reporting import Metrics, Progress, bits_per_byte, duration, environment, plot_loss, write_json

TRAINING_STATE = "training_state.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


def accumulate_gradients(accelerator, model, batches):
    """The gradient of the mean loss over all scored tokens of all micro-batches and processes.

    The mean is over tokens and not over micro-batches, so that a token counts the same wherever
    it falls.

    Args:
        batches: this process's micro-batches, with `shift_labels` of which -100 are not scored.

    Returns:
        The loss in nats per token, a scalar tensor, the same on all processes.
    """
    num_targets = sum((batch["shift_labels"] != -100).sum() for batch in batches)
    num_targets = accelerator.reduce(num_targets.to(accelerator.device), "sum")
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        batch = {key: tensor.to(accelerator.device) for key, tensor in batch.items()}
        # Only a model that sees `labels` computes a loss; `shift_labels` is what it scores.
        labels = {"labels": batch["shift_labels"], "num_items_in_batch": num_targets}
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = model(**batch, **labels, use_cache=False).loss
            # Data parallelism averages gradients over processes, and their sum is wanted.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total, "sum")


class Run:
    """A training run in progress."""

    def __init__(self, recipe, accelerator, threads, resume):
        self.recipe, self.accelerator = recipe, accelerator
        self.tokenizer = load_tokenizer(recipe.tokenizer)
        config = build_config(recipe, self.tokenizer)
        self.size, self.accumulation = recipe.windows_per_process(accelerator.num_processes)
        cache_dir = recipe.cache_dir or os.path.join(recipe.output_dir, ".corpus")
        with accelerator.main_process_first():
            self.corpus = load_corpus(recipe, self.tokenizer, cache_dir)
        self.windows = Windows(
            self.corpus.train,
            recipe.sequence_length,
            recipe.batch_size,
            recipe.seed,
            recipe.packing,
        )
        manifest, folder = newest_checkpoint(recipe.run_dir) or ({}, None) if resume else ({}, None)
        if folder:
            self._check_same_run(manifest, folder)
        self.step, self.seconds = manifest.get("step", 0), manifest.get("seconds", 0.0)
        # The order of summation, and so the last bit, depends on the number of threads.
        self.threads = threads if recipe.cpu_threads else manifest.get("cpu_threads", threads)
        torch.set_num_threads(self.threads)

        model = build_model(recipe, config, folder)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe),
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        if folder:
            state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
            set_optimizer_state_dict(
                self.model, self.optimizer.optimizer, state["optimizer"], options=WHOLE
            )
        accelerator.print(
            f"{self.title()}, {accelerator.num_processes} x {accelerator.device.type}, "
            f"{self.threads} threads, {self._precision()}\n"
            f"{self.corpus.record['train']['bytes']:,} bytes of text in "
            f"{self.windows.num_windows:,} windows of {recipe.sequence_length} tokens; "
            f"{self._tokens(recipe.steps):,} tokens to train"
        )
        if resume:
            where = f"{folder} after step {self.step}" if folder else "the beginning: no checkpoint"
            accelerator.print(f"Continuing from {where}")

    def _check_same_run(self, manifest, folder):
        changed = changes_history(manifest["recipe"], self.recipe, manifest["step"])
        for name in ("corpus", "tokenizer"):
            if manifest[name] != self._identity()[name]:
                changed.append(
                    f"the {name} is another: {manifest[name][:8]} -> {self._identity()[name][:8]}"
                )
        if changed:
            raise UsageError(
                f"{folder} was trained otherwise ({'; '.join(changed)}); undo the change, or "
                "start a new run with --name."
            )

    def _identity(self):
        record = self.corpus.record
        return {"corpus": record["sha256"], "tokenizer": record["tokenizer_sha256"]}

    def _precision(self):
        return "bf16" if self.accelerator.native_amp else "fp32"

    def _tokens(self, steps):
        return steps * self.recipe.batch_size * self.recipe.sequence_length

    def train(self):
        """Runs the steps that are left.

        Returns:
            The signal that ended it early, or None.

        Raises:
            Diverged: the loss or the gradient is not finite; nothing was saved since.
        """
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            recipe.run_dir.mkdir(parents=True, exist_ok=True)
            remove_unfinished(recipe.run_dir)
            self.metrics = Metrics(recipe.run_dir / "metrics.jsonl", self.step)
            self._write_record()
            self.progress = Progress(self.step, recipe.steps)
        self._start_trackers()
        signals = StopSignals()
        logged, logged_seconds = self.step, self.seconds
        while self.step < recipe.steps:
            began = time.perf_counter()
            loss, norm, rate = self._train_step()
            self.seconds += time.perf_counter() - began
            last = self.step == recipe.steps
            stopped = self._any_process(signals.received is not None)
            if self.step % recipe.log_every == 0 or last:
                speed = self._tokens(self.step - logged) / (self.seconds - logged_seconds)
                logged, logged_seconds = self.step, self.seconds
                self._log_step(loss, norm, rate, speed)
            if last or (recipe.eval_every and self.step % recipe.eval_every == 0):
                self.evaluate()
            due = recipe.checkpoint_every and self.step % recipe.checkpoint_every == 0
            if due or last or stopped:
                self.save_checkpoint()
            if stopped and not last:
                return signals.received or signal.SIGTERM
        return None

    def _any_process(self, flag):
        # All processes leave after the same step, or those left behind would wait forever.
        flag = torch.tensor(int(flag), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0

    def _train_step(self):
        recipe, accelerator = self.recipe, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        # Dropout draws from a generator of this step's own, so there is no state of it to restore.
        entropy = np.random.SeedSequence([recipe.seed, self.step, rank])
        set_seed(int(entropy.generate_state(1)[0]))
        rate = recipe.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batches = [
            self.windows.batch(self.step, rank, micro, world, self.size)
            for micro in range(self.accumulation)
        ]
        loss = accumulate_gradients(accelerator, self.model, batches).item()
        largest = recipe.gradient_clip or math.inf
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), largest))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            checkpoints = list_checkpoints(recipe.run_dir)
            kept = f"{checkpoints[-1][1]} is kept" if checkpoints else "there is no checkpoint yet"
            raise Diverged(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; stopped before the "
                f"update, {kept}. Lower learning_rate or lengthen warmup_steps."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, norm, rate

    def _log_step(self, loss, norm, rate, speed):
        if not self.accelerator.is_main_process:
            return
        train = self.corpus.train
        figures = {
            "loss": loss,
            # Over the corpus's mean length of a token.
            "bits_per_byte": bits_per_byte(loss * len(train.ids), train.num_bytes),
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": speed,
            **diagnostics(self.accelerator, self.model),
        }
        self._record("train", figures)
        self.progress.update(self.step, loss, speed)

    def _record(self, kind, figures):
        at = {"tokens": self._tokens(self.step), "seconds": self.seconds}
        self.metrics.write(kind=kind, step=self.step, **at, **figures)
        tracked = {f"{kind}/{name}": value for name, value in figures.items()}
        self.accelerator.log(tracked, step=self.step)

    def evaluate(self):
        """Measures held-out bits per byte, draws the curve, prints samples."""
        recipe, accelerator = self.recipe, self.accelerator
        value = held_out_bits_per_byte(accelerator, self.model, self.corpus.held_out, recipe)
        if accelerator.is_main_process:
            gzip = self.corpus.record["held_out"]["gzip_bits_per_byte"]
            watched = diagnostics(accelerator, self.model, self.corpus.held_out, recipe)
            self._record("held_out", {"bits_per_byte": value, **watched})
            self.progress.say(
                f"step {self.step}: held-out {value:.4f} bits per byte (gzip -9: {gzip:.4f})"
            )
            plot_loss(recipe.run_dir / "loss.png", self.metrics.lines, gzip, self.title())
            for prompt in recipe.sample_prompts:
                text = sample(
                    accelerator, self.model, self.tokenizer, prompt, recipe.sample_tokens, self.step
                )
                self.progress.say("  | " + text.replace("\n", "\n  | "))
        accelerator.wait_for_everyone()

    def title(self):
        """One line that says what was trained."""
        return f"{self.recipe.name}: {self.recipe.architecture}, {self.num_parameters:,} parameters"

    def _save_model(self, folder):
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)

    def save_checkpoint(self):
        """Writes everything that `--resume` needs."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)

        def write_files(folder):
            self._save_model(folder)
            torch.save({"optimizer": optimizer}, folder / TRAINING_STATE)
            recipe = dataclasses.asdict(self.recipe)
            state = {"seconds": self.seconds, "cpu_threads": self.threads, "recipe": recipe}
            return {**state, **self._identity()}

        if self.accelerator.is_main_process:
            keep = self.recipe.keep_checkpoints
            write_checkpoint(self.recipe.run_dir, self.step, write_files, keep)
        self.accelerator.wait_for_everyone()

    def finish(self):
        """Puts the final model into the run's folder and completes run.json."""
        if self.accelerator.is_main_process:
            folder = self.recipe.run_dir / f"final{UNFINISHED}"
            folder.mkdir()
            self._save_model(folder)
            move_into(folder, self.recipe.run_dir)
            self._write_record()
            self.progress.close()
            result = self._results()
            print(
                f"{self.recipe.run_dir}: held-out {result['held_out_bits_per_byte']:.4f} bits per "
                f"byte, gzip -9 {result['gzip_bits_per_byte']:.4f}; {result['tokens']:,} tokens in "
                f"{duration(self.seconds)}"
            )
        # All leave together: one that took its connections down while another is at work has been
        # seen to abort.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _results(self):
        measured = [line for line in self.metrics.lines if line["kind"] == "held_out"]
        if not measured:
            return {}
        return {
            "held_out_bits_per_byte": measured[-1]["bits_per_byte"],
            "gzip_bits_per_byte": self.corpus.record["held_out"]["gzip_bits_per_byte"],
            "step": self.step,
            "tokens": self._tokens(self.step),
            "training_seconds": self.seconds,
        }

    def _write_record(self):
        accelerator = self.accelerator
        record = {
            "command": shlex.join(sys.argv),
            "recipe": dataclasses.asdict(self.recipe),
            "parameters": self.num_parameters,
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "precision": self._precision(),
            "cpu_threads": self.threads,
            "corpus": self.corpus.record,
            **environment(REPOSITORY),
            "results": self._results(),
        }
        write_json(self.recipe.run_dir / "run.json", record)

    def _start_trackers(self):
        recipe = self.recipe
        options = {
            "tensorboard": {"purge_step": self.step},
            "trackio": {"name": recipe.name},
            "wandb": {"name": recipe.name},
        }
        flat = {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
        self.accelerator.init_trackers("longzoo", config=flat, init_kwargs=options)
