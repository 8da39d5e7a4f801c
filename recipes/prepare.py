"""Tokenises the text of a recipe beforehand, so that pretrain.py begins at once.

    python recipes/prepare.py recipes/configs/retnet_demo.toml --workers 8 --key value ...

The cache is the one that pretrain.py would fill, byte for byte, whatever the number of workers.
What it holds already is not made again, and what a killed start left is removed by the next.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time

# Nothing is computed here, and workers are forked: threads would only be in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pretraining.building import load_tokenizer
from pretraining.mixing import load_mixture, sources_of
from pretraining.recipe import UsageError, read_recipe
from pretraining.reporting import duration

USAGE = 2  # exit status, as pretrain.py has it


def refuse(message):
    """Says what is wrong with the command line, without the list of all options."""
    raise UsageError(f"{message} (--help says what there is)")


def parse(arguments):
    """The recipe, with what the command line changes of it."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="any key of the recipe is also --key value",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a TOML file")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that tokenise, instead of the recipe's tokenising_workers; 0: every "
        "physical core for a large text; 1: this process alone",
    )
    parser.error = refuse
    options, overrides = parser.parse_known_args(arguments)
    recipe = read_recipe(options.recipe, overrides)
    if options.workers is not None:
        recipe = dataclasses.replace(recipe, tokenising_workers=options.workers)
    return recipe


def prepare(recipe):
    """Fills the caches of a recipe's text and says what is in them."""
    began = time.monotonic()
    for name, _, source in sources_of(recipe):
        if source.streaming:
            raise UsageError(
                f"{name or source.data} is streamed, which fills no cache; leave streaming out, or "
                "train right away."
            )
    mixture = load_mixture(recipe, load_tokenizer(recipe.tokenizer))
    for part in mixture.parts:
        record = part.corpus.record
        train, held_out = record["train"], record["held_out"]
        print(
            f"{part.name or record['source']}: {train['tokens']:,} tokens of {train['bytes']:,} "
            f"bytes to train on, {held_out['bytes']:,} bytes held out"
        )
    print(f"{recipe.corpus_dir} holds it all, after {duration(time.monotonic() - began)}")


def stop(number, frame):
    """Leaves by way of an exception, so that what is half done is removed."""
    raise KeyboardInterrupt(number)


def main():
    """Turns what the user can put right into one line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), stop)
    try:
        prepare(parse(sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt as stopped:
        number = signal.Signals(stopped.args[0])
        print(f"{number.name}: nothing is left half done; start again", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
