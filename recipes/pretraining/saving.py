"""What a run saves of its model and optimizer, whole from one process or in shards from all.

Where every process has all weights, the main one writes a folder that `from_pretrained` loads and
the optimizer's state beside it. Under FSDP2 each process writes what it holds, through
torch.distributed.checkpoint, and no process ever holds all of it. Either kind is loaded by any
number of processes, whole or sharded.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from .averaging import EMA
from .building import build_model
from .checkpointing import (
    SHARDS,
    SHARDS_INDEX,
    TRAINING_STATE,
    begin_checkpoint,
    finish_checkpoint,
    unfinished_checkpoint,
    write_checkpoint,
)
from .lora import save_adapter, save_merged
from .recipe import UsageError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Saver:
    """Writes and reads the checkpoints of a run. All processes call each method.

    Args:
        recipe: of the run.
        accelerator: of accelerate.
        average: an `Average`, of the language model in no wrappers.
        optimizer: of torch.
        tokenizer: saved beside each model.
        zero: a `Zero` if DeepSpeed trains the model.
    """

    def __init__(self, recipe, accelerator, average, optimizer, tokenizer, zero=None):
        self.recipe, self.accelerator = recipe, accelerator
        self.average, self.model = average, average.model
        self.optimizer, self.tokenizer = optimizer, tokenizer
        self.sharded, self.zero = accelerator.is_fsdp2, zero
        self._thread, self._writing, self._group = ThreadPoolExecutor(1), None, None

    def load(self, folder):
        """Takes up what a checkpoint holds.

        The weights of a whole one are in the model already: it was made from them.
        """
        in_shards = (folder / SHARDS_INDEX).is_file()
        if in_shards and self.zero:
            raise UsageError(
                f"{folder} was saved in shards by FSDP2, which DeepSpeed does not take up; go on "
                "with recipes/accelerate/fsdp2.yaml or ddp.yaml."
            )
        if in_shards:
            state = self._sharded_state()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(state, checkpoint_id=folder / SHARDS)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        else:
            state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
            if self.zero:
                self.zero.load_optimizer_state(state["optimizer"])
                return
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
            if self.average.decay:
                saved = build_model(self.recipe, self.model.config, folder / EMA).state_dict()
                with self.average.in_place():
                    set_model_state_dict(self.model, saved, options=WHOLE)

    def save(self, step, facts, say, write_beside):
        """Writes a checkpoint; with `async_checkpoints`, shards are written while training goes on.

        Args:
            step: steps done.
            facts: what its manifest also says.
            say: prints a line; the main process calls it.
            write_beside: writes into the folder what else there is; the main process calls it.
        """
        self.wait()
        if self.sharded:
            self._save_shards(step, facts, say, write_beside)
        else:
            self._save_whole(step, facts, say, write_beside)
        self.accelerator.wait_for_everyone()

    def _save_whole(self, step, facts, say, write_beside):
        if self.zero:
            optimizer = self.zero.optimizer_state()
        else:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        weights = self._weights()

        def write_files(folder):
            if self.recipe.lora:
                save_adapter(self.model, folder)
                self.tokenizer.save_pretrained(folder)
            else:
                self._write_model(folder, weights)
            if self.average.decay:
                with self.average.in_place():
                    self._write_model(folder / EMA, None)
            torch.save({"optimizer": optimizer}, folder / TRAINING_STATE)
            write_beside(folder)
            return facts

        if self.accelerator.is_main_process:
            keep = self.recipe.keep_checkpoints
            write_checkpoint(self.recipe.run_dir, step, write_files, keep, say)

    def _save_shards(self, step, facts, say, write_beside):
        recipe, is_main = self.recipe, self.accelerator.is_main_process
        folder = unfinished_checkpoint(recipe.run_dir, step)
        if is_main:
            begin_checkpoint(recipe.run_dir, step)
            self.model.config.save_pretrained(folder)
            self.model.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_beside(folder)
        self.accelerator.wait_for_everyone()  # for the folder
        state = self._sharded_state()
        shards = {"state_dict": state, "checkpoint_id": folder / SHARDS}

        def finish(writing=None):
            if writing:
                writing.result()
            if is_main:  # whose shards are done when those of all are
                finish_checkpoint(folder, step, facts, recipe.keep_checkpoints, say)

        if recipe.async_checkpoints:
            self._group = self._group or torch.distributed.new_group(backend="gloo")
            writing = dcp.async_save(**shards, process_group=self._group)
            self._writing = self._thread.submit(finish, writing)
        else:
            dcp.save(**shards)
            finish()

    def _sharded_state(self):
        """What shards hold, as it is in memory."""
        state = dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer)))
        return state | ({"average": self.average.named()} if self.average.decay else {})

    def wait(self):
        """Returns when what is being written is there."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def write_model(self, folder):
        """Writes the model as `from_pretrained` reads it, into a folder of the main process."""
        self._gather_and_write(folder)
        if self.average.decay:
            with self.average.in_place():
                self._gather_and_write(folder / EMA)

    def _gather_and_write(self, folder):
        weights = self._weights()
        if not self.accelerator.is_main_process:
            return
        if self.recipe.lora:
            save_merged(self.model, folder)
            self.tokenizer.save_pretrained(folder)
        else:
            self._write_model(folder, weights)

    def _weights(self):
        """The whole weights by name, if they are not in the model itself."""
        if self.zero:
            return self.accelerator.get_state_dict(self.zero.engine)
        return get_model_state_dict(self.model, options=WHOLE) if self.sharded else None

    def _write_model(self, folder, weights):
        for name in self.model.all_tied_weights_keys if weights else ():
            weights.pop(name, None)  # gathered, it is a copy of what it is tied to
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
