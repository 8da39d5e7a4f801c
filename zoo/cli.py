"""`zoo contract | convert | export | info | push`."""

import argparse
import os
import shlex
import sys
import textwrap
from importlib import metadata

from . import __version__

# What takes long to import is imported by the command that needs it: `zoo --help` does not wait.


def main(argv=None):
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is printed as one line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["contract"]:
            # Its arguments are its own, --help too.
            from .contract import main as contract_main

            return contract_main(argv[1:])
        if argv[:1] == ["convert"] and "--list" in argv:
            # Without what it otherwise requires.
            return _list_formats()
        arguments = _parser(is_auto="--auto" in argv).parse_args(argv)
        return arguments.run(arguments)
    except BrokenPipeError:
        # Whoever read the output has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"zoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        names = ("torch", "transformers", "huggingface_hub")
        print(", ".join([f"zoo {__version__}", *(f"{n} {metadata.version(n)}" for n in names)]))
        parser.exit()


def _parser(is_auto=False):
    parser = argparse.ArgumentParser(
        prog="zoo",
        description="The model zoo's tools.",
        epilog="zoo COMMAND --help explains each, with an example.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser(
        "contract", help="check that every way of running a model gives the same numbers"
    )

    command = _add(
        commands,
        "convert",
        "turn a foreign checkpoint into one of ours, or back",
        """
        zoo convert rwkv-pth RWKV-x070-World-0.4B.pth models/rwkv7
        zoo convert --auto RWKV-x070-World-0.4B.pth models/rwkv7
        zoo convert hf-mistral --reverse models/mistral models/mistral-for-transformers""",
    )
    if not is_auto:
        command.add_argument("format", metavar="FORMAT", help="the foreign one; see --list")
    command.add_argument(
        "--auto", action="store_true", help="in place of FORMAT: recognise it by SRC's contents"
    )
    command.add_argument(
        "src",
        metavar="SRC",
        help="folder with config and weights, or weight file; or OWNER/NAME[@REVISION][/FILE] on "
        "the Hub",
    )
    command.add_argument("dst", metavar="DST", help="folder to write")
    command.add_argument(
        "--reverse", action="store_true", help="SRC is one of ours, DST becomes a FORMAT"
    )
    command.add_argument("--list", action="store_true", help="name the formats and stop")
    _add_overwrite(command, "DST")
    _add_size(command)
    command.set_defaults(run=_convert)

    command = _add(
        commands,
        "export",
        "write a checkpoint as a folder that loads without zoo",
        """
        zoo export runs/retnet_demo exported/retnet_demo --contract
        zoo export models/rwkv7 exported/rwkv7 --license apache-2.0""",
    )
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a model or a run, or OWNER/NAME[@REVISION] on the Hub",
    )
    command.add_argument("out", metavar="OUT", help="folder to write")
    _add_overwrite(command, "OUT")
    command.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, the Hub's name of it (what their source says; of a run apache-2.0)",
    )
    command.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="on the Hub, which these weights are or were made from (what their source says)",
    )
    _add_size(command)
    command.add_argument(
        "--format",
        default="zoo",
        choices=("zoo", "native"),
        help="native: for transformers' own class, else flash-linear-attention's, where there is "
        "one (%(default)s: with our code)",
    )
    command.add_argument(
        "--contract",
        action="store_true",
        help="measure every way of running what is written, and put the figures on its card",
    )
    command.set_defaults(run=_export)

    command = _add(
        commands,
        "info",
        "say what a model is: config, parameters, state",
        """
        zoo info rwkv7
        zoo info runs/retnet_demo""",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="an architecture's name, a folder, or OWNER/NAME[@REVISION] on the Hub",
    )
    command.set_defaults(run=_info)

    command = _add(
        commands,
        "push",
        "upload an exported folder to the Hugging Face Hub",
        """
        zoo push exported/retnet_demo me/retnet-demo --dry-run
        zoo push exported/retnet_demo me/retnet-demo --private""",
    )
    command.add_argument("exported", metavar="EXPORTED", help="folder that `zoo export` wrote")
    command.add_argument("repo_id", metavar="REPO_ID", help="user/name on the Hub")
    command.add_argument("--private", action="store_true", help="a new one only its owner sees")
    command.add_argument("--message", help="of the commit")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would go up and what would go; send nothing",
    )
    command.set_defaults(run=_push)
    return parser


def _add(commands, name, title, examples):
    return commands.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}.",
        epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_overwrite(command, folder):
    text = f"replace a model that zoo wrote to {folder}; what else lies there stays"
    command.add_argument("--overwrite", action="store_true", help=text)


def _add_size(command):
    command.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a weight file, and of the memory that is needed (%(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to round the weights to (as they are)",
    )


def _list_formats():
    from .hub.convert import FORMATS

    width = max(map(len, FORMATS))
    for name, chosen in FORMATS.items():
        print(f"{name:{width}}  {chosen.title}")
    return 0


def _convert(arguments):
    from .hub.convert import convert, convert_back
    from .hub.convert.formats import find_format
    from .hub.convert.recognise import recognise
    from .hub.download import fetch

    if not arguments.auto:
        find_format(arguments.format)  # before anything large is downloaded
    src = fetch(arguments.src)
    _hide_progress_bars()
    if arguments.auto:
        if arguments.reverse:
            raise ValueError("--auto says what SRC is; with --reverse name the FORMAT to write.")
        arguments.format = recognise(src)
        print(f"{arguments.src}: {arguments.format}")
    run = convert_back if arguments.reverse else convert
    report = run(
        arguments.format,
        src,
        arguments.dst,
        arguments.overwrite,
        arguments.max_shard_size,
        arguments.dtype,
    )
    dtype = str(report.dtype).removeprefix("torch.")
    print(
        f"{arguments.dst}: {report.num_parameters:,} parameters in {report.num_tensors} tensors, "
        f"{dtype}, {'from' if report.is_rounded else 'exactly as in'} {arguments.src}"
    )
    _print_notes(report.notes)
    print("next:")
    for step in _next_steps(arguments, report):
        # A command is copied: it stays on its line.
        print(f"  {step}") if step.startswith("zoo ") else _print_notes([step])
    return 0


def _next_steps(arguments, report):
    """What to do with a converted checkpoint."""
    from .hub.convert import FORMATS

    dst, format = shlex.quote(arguments.dst), FORMATS[arguments.format]
    steps = []
    if not report.has_tokenizer:
        steps.append(f"a tokenizer, as none came along: {format.tokenizer.format(dst=dst)}")
    if arguments.reverse:
        return [*steps, f"load it as {format.title.removesuffix('; both ways')}"]
    license = "" if report.license else " --license ID"
    return [
        *steps,
        f"zoo export {dst} OUT{license}    # for use without zoo, and for the Hub",
        f"zoo contract {dst}    # every way of running it, compared",
    ]


def _print_notes(notes):
    for note in notes:
        print(textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="    "))


def _export(arguments):
    from .hub.download import fetch
    from .hub.export import export, require_license

    checkpoint = fetch(arguments.checkpoint, expected="folder of a checkpoint or run")
    _hide_progress_bars()
    if arguments.license is None:
        require_license(checkpoint)
    exported = export(
        checkpoint,
        arguments.out,
        arguments.overwrite,
        arguments.license,
        arguments.max_shard_size,
        arguments.format,
        arguments.base_model,
        arguments.dtype,
        arguments.contract,
    )
    runs_on = f"{exported.library} {exported.model_class}"
    if exported.code:
        runs_on = f"{exported.model_class} and the code it runs on, {len(exported.code)} files"
    print(f"{arguments.out}: {exported.num_parameters:,} parameters, {runs_on}")
    _print_notes(exported.notes)
    if not exported.has_tokenizer:
        print("  without a tokenizer: the checkpoint has none")
    return 0


def _info(arguments):
    from .hub.info import describe

    print(describe(arguments.model))
    return 0


def _push(arguments):
    from .hub.push import push

    try:
        commit = push(
            arguments.exported,
            arguments.repo_id,
            private=arguments.private,
            message=arguments.message,
            dry_run=arguments.dry_run,
            show=_print_plan,
        )
    except KeyboardInterrupt:
        print(
            "\nzoo: interrupted, nothing was committed; give the command again: files that went up "
            "whole are not sent again.",
            file=sys.stderr,
        )
        return 130
    if arguments.dry_run:
        print("nothing was sent: a dry run")
    else:
        print(commit or "nothing was sent: the repository is as this folder")
    return 0


def _print_plan(plan):
    kind = f"{'a new' if plan.is_new else 'a'} {'private' if plan.is_private else 'public'}"
    print(f"{plan.url}: {kind} repository")
    width = max(map(len, plan.sizes))
    for name, size in plan.sizes.items():
        print(f"  {plan.states[name]:9}  {name:{width}}  {_in_bytes(size):>8}")
    for name in plan.removed:
        print(f"  {'removed':9}  {name}")
    sent = _in_bytes(sum(plan.sizes[name] for name in plan.sent))
    print(f"to send: {sent} in {len(plan.sent)} of {len(plan.sizes)} files")
    if plan.left_out:
        _print_notes([f"not of the model, so it stays here: {', '.join(plan.left_out)}"])
    sys.stdout.flush()


def _in_bytes(number):
    """A number of bytes, for people: 1.2 GB."""
    if number < 1000:
        return f"{number} B"
    number, units = number / 1000, ["kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.1f} {units[0]}"


def _hide_progress_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()
