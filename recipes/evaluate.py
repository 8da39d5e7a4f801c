"""Evaluates any causal language model as a run of pretrain.py is: on text, in state and in speed.

    python recipes/evaluate.py runs/retnet_demo --output retnet.json
    python recipes/evaluate.py OWNER/NAME --data my_text.jsonl --contexts 256 1024 4096
    python recipes/evaluate.py --write_lm_eval my_tasks --data my_text.jsonl

MODEL is the folder of a run, a checkpoint, an export or any model that transformers loads, or a Hub
id. Text is what a run of the same data holds out, read with the model's own tokenizer; for a run's
folder that is the run's own. --write_lm_eval writes a folder of tasks on the same text for
lm-evaluation-harness, with or without a model.
"""

import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP

import torch

from pretraining.building import REPOSITORY
from pretraining.comparing import bits_per_byte_by_context, check_text_for
from pretraining.recipe import UsageError
from pretraining.reporting import environment, write_json
from pretraining.usage import run_script
from scoring.command_line import CONTEXTS, parse, text_recipe
from scoring.lm_eval_folder import commands_for, write_folder
from scoring.measures import (
    Here,
    bits_per_byte_of_documents,
    speeds,
    state_sizes,
    stream_figures,
)
from scoring.models import find_device, import_all, load_subject
from scoring.tables import describe, table
from scoring.texts import boundary_of, held_out_text, tokens_of
from scoring.trained_tasks import task_figures
from scoring.word_tasks import accuracy

USAGE = 2  # exit status, as pretrain.py has it
WRITTEN = 33  # tokens that are generated to measure how fast


def choose_lengths(options, subject, tokens):
    """(tokens per window, contexts), as asked for or as fits.

    Raises:
        UsageError: the model or the text does not have so many.
    """
    limit, asked = subject.num_positions or sys.maxsize, options.contexts or []
    said = min(subject.declared_length or 1024, 1024)
    length = options.sequence_length or subject.trained_length or said
    longest = max([length, *asked])
    if longest > limit:
        raise UsageError(
            f"{subject.name} has {limit} positions, got windows of {longest} tokens; choose "
            "shorter --sequence_length and --contexts."
        )
    if options.positions > length:
        raise UsageError(
            f"--positions are parts of a window of {length} tokens, got {options.positions}."
        )
    if asked:
        check_text_for(asked, tokens, "--contexts", "--eval_bytes")
    fitting = min(limit, len(tokens.ids) - 1)
    return length, asked or [context for context in CONTEXTS if context <= fitting]


def check_tokenizer(tokens, model):
    """Raises a UsageError if text has ids that the model does not know."""
    largest, rows = tokens.ids.max(), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UsageError(
            f"the tokenizer gave the id {largest}, and the model has {rows} embeddings; choose the "
            "--tokenizer that it was trained with."
        )


def evaluate(options):
    """Everything that is measured, as it is written to the JSON file."""
    import_all(options.modules)
    device = find_device(options.device)
    subject = load_subject(
        options.model, device, options.dtype, options.trust_remote_code, options.tokenizer
    )
    if subject.recipe and subject.recipe.task:
        figures = subject.described() | task_figures(subject, options)
        print(describe(figures), flush=True)
    else:
        figures = evaluate_on_text(subject, options, device)
    return {**figures, **environment(REPOSITORY)}


def evaluate_on_text(subject, options, device):
    """What is measured of a model of text."""
    model, tokenizer = subject.model, subject.tokenizer
    recipe = text_recipe(options, subject.recipe)
    held_out = held_out_text(recipe, options.whole)
    if options.write_lm_eval:
        write_folder(options.write_lm_eval, held_out)
    tokens, (boundary, is_end) = tokens_of(held_out.documents, tokenizer), boundary_of(tokenizer)
    check_tokenizer(tokens, model)
    length, contexts = choose_lengths(options, subject, tokens)
    at_once = options.batch_tokens
    recipe = dataclasses.replace(
        recipe, sequence_length=length, eval_batch_size=max(1, at_once // length)
    )
    token = tokenizer.convert_ids_to_tokens(boundary)
    record = {
        **subject.described(),
        "text": {**held_out.record, "tokens": len(tokens.ids), "whole": options.whole},
        "boundary": {"id": boundary, "token": token, "scored": is_end},
        "sequence_length": length,
        "packing": recipe.packing,
    }
    print(describe(record), flush=True)
    record |= stream_figures(model, tokens, recipe, options.positions)
    by_document = bits_per_byte_of_documents(model, tokens, length, at_once)
    record["bits_per_byte_of_documents"] = by_document
    if contexts:
        by_context = bits_per_byte_by_context(
            Here(device), model, tokens, contexts, at_once, recipe.packing
        )
        record |= {f"bits_per_byte_in_context/{n}": bits for n, bits in by_context.items()}
        model.eval()
    ids = torch.from_numpy(tokens.ids.astype("int64"))
    seen = sorted(n for n in {length, *contexts} if n <= len(ids))
    record["state_bytes"] = {str(n): x for n, x in state_sizes(model, ids, seen).items()}
    room = (subject.num_positions or sys.maxsize) - WRITTEN
    record |= speeds(model, ids[: max(1, min(length, room))], WRITTEN)
    for name in options.tasks:
        record[f"accuracy/{name}"] = accuracy(subject, name, at_once)
    return record


def start(arguments):
    """Reads the command line, measures, prints and writes."""
    options = parse(arguments, __doc__)
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise UsageError(f"--output: there is no folder {Path(options.output).parent}.")
    if not options.model:
        write_folder(options.write_lm_eval, held_out_text(text_recipe(options), options.whole))
        print(
            f"wrote {options.write_lm_eval}; with a model:\n{commands_for(options.write_lm_eval)}"
        )
        return
    record = evaluate(options)
    print(table(record))
    if options.write_lm_eval:
        print(f"wrote {options.write_lm_eval}; the same by lm-evaluation-harness:")
        print(commands_for(options.write_lm_eval, record))
    if options.output:
        write_json(options.output, record)
        print(f"wrote {options.output}")


def main():
    """Turns what the user can put right into one line."""
    run_script(start)


if __name__ == "__main__":
    main()
