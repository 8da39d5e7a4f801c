"""The referee's verdicts on models of transformers: writes recipes/results/contract/.

    python tests/contract/referee_table.py [MODEL ...]

Tiny, with random weights. Every failure is explained by a program of direct_faults.py, which is
run as well and has to show it; a failure without one, or one that is not there, ends this with 1.
"""

import argparse
import json
import sys
from pathlib import Path

import direct_faults
import torch
import transformers

from zoo.contract import (
    DOES_NOT_APPLY,
    FAILED,
    NOT_PROMISED,
    NOT_RUN,
    PASSED,
    POINTS,
    find_subject,
    judge,
    printing,
)

FOLDER = Path(__file__).parents[2] / "recipes" / "results" / "contract"
MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "xlstm": "xLSTMForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "jamba": "JambaForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
}
DECODING = (
    "generate, token by token = whole",
    "generate after a prompt of",
    "greedy generate = argmax",
    "sampling with a seed",
    "forward passes token by token = whole",
)
PACKING = ("packed with position_ids, seq_idx and cu_seq_lens", "gradients of packed documents")
LEFT_PADDING = ("prompts padded on the left in generate",)
# Model -> program that shows a fault -> beginnings of the names of the checks that it explains.
EXPLAINED = {
    "rwkv": {"rwkv_rows": DECODING, "rwkv_padding": LEFT_PADDING},
    "minimax": {
        "minimax_padding": LEFT_PADDING,
        "minimax_documents": PACKING,
        "minimax_beams": ("3 beams with a cache",),
        "minimax_length": (
            "generate from a cache with more tokens",
            "forward passes over pieces",
            "forward passes token by token = whole",
        ),
    },
    "mamba2": {"mamba2_documents": PACKING},
    "recurrent_gemma": {
        "recurrent_gemma_padding": LEFT_PADDING,
        "recurrent_gemma_documents": PACKING,
    },
    "xlstm": {
        "xlstm_resize": ("logits of the old tokens after resize",),
        "xlstm_bf16": ("bf16 gives finite logits",),
    },
    "jamba": {"jamba_documents": PACKING},
    "zamba2": {"zamba2_time_step": DECODING},
}
MARKS = {PASSED: "passed", FAILED: "**failed**", DOES_NOT_APPLY: "-", NOT_RUN: "not run"}


def explained(model, report):
    """The failures of a model by the program that shows them, and those that none does.

    Returns:
        (program name -> its checks, the checks left over, the programs without a check).
    """
    found, left = {}, list(report.failed())
    for program, beginnings in EXPLAINED.get(model, {}).items():
        found[program] = [check for check in left if check.name.startswith(beginnings)]
        left = [check for check in left if check not in found[program]]
    return found, left, [program for program, checks in found.items() if not checks]


def main(argv=None):
    """Judges the models, writes their results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        parser.error(f"expected some of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wrong, reports = [], {}
    for model in arguments.models or MODELS:
        report = reports[model] = judge(find_subject(MODELS[model]), budget=None)
        content = json.dumps(report.as_dict(), indent=1)
        (arguments.folder / f"{model}.json").write_text(content + "\n")
        found, left, idle = explained(model, report)
        wrong += [f"{model}: {check.name} failed and nothing explains it" for check in left]
        wrong += [f"{model}: {program} explains no failure" for program in idle]
        print(f"{model}: {report.totals()}", flush=True)
    shown = {}
    for program in direct_faults.PROGRAMS:
        with torch.no_grad():
            shown[program.__name__] = program()
        if not shown[program.__name__].is_there:
            wrong.append(f"{program.__name__} shows nothing")
    if not arguments.models:
        (arguments.folder / "README.md").write_text(table(reports, shown))
    print("\n".join(wrong) or "every failure is explained, and shown by a program of its own")
    return int(bool(wrong))


def table(reports, shown):
    """The README of the folder."""
    versions = next(iter(reports.values())).versions
    lines = [
        "# The referee on models of others",
        "",
        "Tiny models of transformers with random weights, as `zoo contract CLASS` judges them, by",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + ", on a CPU, without",
        "the kernels of mamba_ssm, causal_conv1d and fla. Each model's file holds every figure.",
        "xLSTM is 128 wide: at 64 its state, of rounded sizes, does not fit its layers, and",
        "it does not run. Written by `python tests/contract/referee_table.py`.",
        "",
        f"| model | {' | '.join(map(str, POINTS))} | run in | computes in | checks |",
        f"| --- | {' | '.join('---' for _ in POINTS)} | --- | --- | --- |",
    ]
    for model, report in reports.items():
        marks = " | ".join(MARKS[report.verdict(point)] for point in POINTS)
        precision = f"{report.precision['run_in']} | {report.precision['computes_in']}"
        checks = f"{report.count(PASSED)} passed, {report.count(FAILED)} failed"
        lines.append(f"| [{model}]({model}.json) | {marks} | {precision} | {checks} |")
    lines += [
        "",
        "The points: "
        + "; ".join(f"{point} {title}" for point, (title, _) in POINTS.items())
        + ". A dash: it does not apply, or nobody promises it.",
        "",
        "## Failures",
        "",
        "Each is explained by a fault that `python tests/contract/direct_faults.py` shows again by",
        "a program of transformers alone, beside a control where the fault has nothing to do.",
        "",
    ]
    for model, report in reports.items():
        found, _, _ = explained(model, report)
        for program, checks in found.items():
            seen = shown[program].seen
            seen = (
                seen
                if isinstance(seen, str)
                else f"{seen:.2g} (control {shown[program].control:.1g})"
            )
            points = ", ".join(str(x) for x in dict.fromkeys(check.point for check in checks))
            names = "; ".join(check.name for check in checks)
            smallest = printing.shown_input(checks[0].smallest)
            lines += [
                f"- **{model}, point {points}**: {shown[program].fault}.",
                f"  Failed: {names}. Smallest input: {smallest}. `{program}`: {seen}.",
            ]
    none = [model for model, report in reports.items() if not report.failed()]
    lines += ["", f"No failure: {', '.join(none)}.", "", "## Refused in words", ""]
    for model, report in reports.items():
        refused = {
            check.reason.removeprefix("it refuses: ")
            for check in report.of(DOES_NOT_APPLY)
            if check.reason.startswith("it refuses: ")
        }
        lines += [f"- {model}: {reason}" for reason in sorted(refused)]
    lines += [
        "",
        "## Different, but promised to nobody",
        "",
        "| compared | models that differ |",
        "| --- | --- |",
    ]
    apart = {}
    for model, report in reports.items():
        for check in report.of(NOT_PROMISED):
            figure = "error" if check.measured is None else printing.show(check.measured)
            apart.setdefault(check.name, []).append(f"{model} {figure}")
    lines += [f"| {name} | {', '.join(models)} |" for name, models in apart.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
