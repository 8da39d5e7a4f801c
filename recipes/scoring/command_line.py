"""The command line of evaluate.py, and the text that it names."""

import argparse
import dataclasses

from pretraining.recipe import Recipe, UsageError

from .word_tasks import chosen

CONTEXTS = (64, 256, 1024)  # those that fit, where none are asked for
TEXT_OPTIONS = {
    "data": (str, "'stdlib', a file, a folder of files, or a Hub id (the run's, else stdlib)"),
    "data_config": (str, "the configuration of a Hub data set"),
    "data_split": (str, "the split of it, of which a part is held out (train)"),
    "text_column": (str, "where the text is (text)"),
    "held_out": (float, "fraction of the documents that is measured (the run's, else 0.05)"),
    "eval_bytes": (int, "bytes measured at most; 0: no limit (the run's, else 1000000)"),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def refuse(message):
    """Says what is wrong with the command line, without the list of all options."""
    raise UsageError(f"{message} (--help says what there is)")


def parse(arguments, description):
    """The options of evaluate.py; they may be spelled with hyphens.

    Args:
        arguments: words of the command line.
        description: for --help, the first line apart.

    Raises:
        UsageError: what no evaluation could use.
    """
    title, _, more = description.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id")
    parser.add_argument("--tokenizer", default="", help="folder or Hub id (the model's own)")
    for name, (kind, text) in TEXT_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    flag = {"action": "store_true"}
    parser.add_argument("--whole", **flag, help="measure all of the data, not what is held out")
    parser.add_argument(
        "--sequence_length", type=int, help="tokens per window (that of training, else 1024)"
    )
    parser.add_argument("--positions", type=int, default=8, help="parts of a window (%(default)s)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help=f"lengths in tokens (of {CONTEXTS}, what fits)"
    )
    parser.add_argument(
        "--tasks", default="", help="in words: zoo_passkey, zoo_recall or both, with a comma"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=4096, help="tokens run at once, about (%(default)s)"
    )
    parser.add_argument("--device", default="", help="cpu, cuda ... (an accelerator if any)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as the weights are")
    parser.add_argument("--trust_remote_code", **flag, help="run code that comes with the model")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="imported first, to make its models known to transformers: fla",
    )
    parser.add_argument("--output", metavar="FILE.json", help="where the figures are written too")
    parser.add_argument(
        "--write_lm_eval", metavar="FOLDER", help="tasks on the text for lm-evaluation-harness"
    )
    options = parser.parse_args([_underscored(word) for word in arguments])
    if not (options.model or options.write_lm_eval):
        refuse("expected a MODEL, or --write_lm_eval FOLDER")
    for name in ("positions", "sequence_length", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            refuse(f"--{name} is at least 1, got {value}")
    if any(length < 1 for length in options.contexts or ()):
        refuse(f"--contexts are numbers of tokens, got {options.contexts}")
    options.tasks = chosen(filter(None, options.tasks.split(",")))
    return options


def _underscored(word):
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def text_recipe(options, recipe=None):
    """The recipe whose held-out text is measured: that of a run, with what the options change.

    Args:
        options: of the command line.
        recipe: of the run that trained the model, or None.
    """
    given = {name: getattr(options, name) for name in TEXT_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = recipe or Recipe("evaluation", "any")
    unneeded = {"context_schedule": [], "carry_state": False, "eval_positions": 0}
    if "data" in given:  # how the run's data is read says nothing about other data
        read = {"data_config": "", "data_split": "train", "text_column": "text"}
        unneeded |= {**read, "streaming": False, "sources": []}
    return dataclasses.replace(recipe, **{**unneeded, **given})
