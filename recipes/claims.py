"""What papers claim, beside what committed sweeps found: writes recipes/results/claims.md.

    python recipes/claims.py [recipes/configs/claims.toml]

A claim names a sweep (recipes/results/ablations/NAME/results.json), a task and two models, or a
model and two lengths. Its verdict is a function of the two files alone:

- that one model is better than another: shown or contradicted where Holm's p over all such claims
  is below 0.05, of a t-test paired by seed, else not shown at this size. A model that fails the
  task's easy control did not learn it, and then nothing is said of what it could hold.
- that one is nearly as good as another: shown where the 95% interval of the difference lies within
  a margin, contradicted where it lies outside of it.
- that a model's speed does not fall with length: shown where it falls by less than a tenth,
  contradicted where by more than half.
"""

import argparse
import json
import math
from dataclasses import MISSING, dataclass, fields

from ablating.statistics import LEVEL, holm, paired
from ablating.summary import CONTROL, last_figures, summarise
from pretraining.building import REPOSITORY
from pretraining.recipe import UsageError, nearest, typed
from pretraining.usage import read_toml, run_script

CLAIMS = REPOSITORY / "recipes/configs/claims.toml"
RESULTS = REPOSITORY / "recipes/results"
KEEPS, LOSES = 0.9, 0.5  # of the speed at the shorter length
SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown at this size", "contradicted"


@dataclass
class Claim:
    """What a paper claims and how it is tested.

    Attributes:
        paper: what to cite.
        claim: in a sentence.
        sweep: a folder of recipes/results/ablations.
        task: of the sweep; empty for speed.
        figure: of a trial's last evaluation, as `bits_per_byte` or `accuracy/pairs_32`, or of speed
            by length, as `training_tokens_per_second`.
        better, worse: two models.
        within: if above 0, the claim is that they are no further apart than this.
        flat: or one model whose speed is the same at both `lengths`.
        lengths: in tokens.
    """

    paper: str
    claim: str
    sweep: str
    figure: str
    task: str = ""
    better: str = ""
    worse: str = ""
    within: float = 0.0
    flat: str = ""
    lengths: list[int] = ()


@dataclass
class Finding:
    """What a sweep says of a claim.

    Attributes:
        found: in words.
        verdict: one of the three above, or why there is none.
        p: of the difference, before Holm; None where there is none.
        sign: 1 where the difference is as claimed.
    """

    found: str
    verdict: str = ""
    p: float | None = None
    sign: int = 0


def read_claims(path):
    """The `Claim`s of a TOML file.

    Raises:
        UsageError: unknown or missing keys, or a claim that is of neither kind.
    """
    kinds = {entry.name: entry for entry in fields(Claim)}
    claims = []
    for number, table in enumerate(read_toml(path).get("claims", []), 1):
        for key in table:
            if key not in kinds:
                raise UsageError(f"claim {number}: unknown key {key!r}: {nearest(key, kinds)}")
        missing = [k for k, v in kinds.items() if v.default is MISSING and k not in table]
        if missing:
            raise UsageError(f"claim {number} lacks {', '.join(missing)}.")
        table = {k: typed(f"claim {number}: {k}", v, kinds[k].type) for k, v in table.items()}
        claim = Claim(**table)
        compares = bool(claim.better and claim.worse and claim.task)
        if compares == bool(claim.flat and len(claim.lengths) == 2):
            raise UsageError(
                f"claim {number} names either a task, a better and a worse model, or a model that "
                f"is flat and two lengths, got {table}."
            )
        claims.append(claim)
    return claims


def read_sweeps(claims):
    """results.json and its summary, by the sweep's name.

    Raises:
        UsageError: a sweep that is not there, or has no such task or model.
    """
    sweeps = {}
    for claim in claims:
        path = RESULTS / "ablations" / claim.sweep / "results.json"
        if claim.sweep not in sweeps:
            if not path.is_file():
                raise UsageError(f"{path} is missing; run recipes/ablate.py and put it there.")
            results = json.loads(path.read_text(encoding="utf-8"))
            sweeps[claim.sweep] = results, summarise(results)
        results, tasks = sweeps[claim.sweep]
        named = [(claim.task, tasks)] if claim.task else []
        named += [(m, results["models"]) for m in (claim.better, claim.worse, claim.flat) if m]
        for name, known in named:
            if name not in known:
                raise UsageError(f"{path}: there is no {name!r}: {nearest(name, known)}")
    return sweeps


def compare(claim, task):
    """The `Finding` of a claim that one model is better than another."""
    entries = task.entries[claim.better], task.entries[claim.worse]
    names = claim.better, claim.worse
    values = [
        {
            seed: figures[claim.figure]
            for seed, trial in entry.trials.items()
            if (figures := last_figures(trial)).get(claim.figure) is not None
        }
        for entry in entries
    ]
    difference = paired(*values, task.answers(claim.figure))
    if difference.p is None:
        return Finding("fewer than two seeds", "not measured")
    means = [math.fsum(x.values()) / len(x) for x in values]
    low, high = difference.mean - difference.half, difference.mean + difference.half
    found = f"{names[0]} {means[0]:.3f}, {names[1]} {means[1]:.3f}; "
    found += f"difference {difference.mean:+.3f} ({low:+.3f} to {high:+.3f})"
    failed = [name for name, entry in zip(names, entries) if entry.learned is False]
    if failed:
        return Finding(found, f"{' and '.join(failed)} did not learn the control")
    if claim.within:
        is_shown = -claim.within <= low and high <= claim.within
        is_outside = low > claim.within or high < -claim.within
        verdict = SHOWN if is_shown else CONTRADICTED if is_outside else NOT_SHOWN
        return Finding(f"{found}, margin {claim.within:g}", verdict)
    sign = math.copysign(1, difference.mean) * (-1 if task.lower_is_better else 1)
    return Finding(found, p=difference.p, sign=int(sign))


def flat(claim, model):
    """The `Finding` of a claim that speed does not fall with length."""
    speeds = {line["length"]: line.get(claim.figure) for line in model["speed"]}
    short, long = (speeds.get(length) for length in claim.lengths)
    if not short or not long:
        return Finding(f"no {claim.figure} at {claim.lengths}", "not measured")
    kept = long / short
    found = f"{short:,.0f} tokens/s at {claim.lengths[0]:,}, {long:,.0f} at {claim.lengths[1]:,}"
    verdict = SHOWN if kept > KEEPS else CONTRADICTED if kept < LOSES else NOT_SHOWN
    return Finding(f"{found} ({kept:.2f})", verdict)


def judge(claims, sweeps):
    """The `Finding` of each claim, in order."""
    findings = []
    for claim in claims:
        results, tasks = sweeps[claim.sweep]
        if claim.flat:
            findings.append(flat(claim, results["models"][claim.flat]))
        else:
            findings.append(compare(claim, tasks[claim.task]))
    corrected = holm({n: finding.p for n, finding in enumerate(findings)})
    for n, finding in enumerate(findings):
        if finding.p is not None:
            finding.verdict = SHOWN if finding.sign > 0 else CONTRADICTED
            if corrected[n] >= 1 - LEVEL:
                finding.verdict = NOT_SHOWN
    return findings


def markdown(claims, findings, sweeps):
    """claims.md."""
    lines = ["# What papers claim, at this size", ""]
    lines += ["Written by `python recipes/claims.py` from recipes/configs/claims.toml and:", ""]
    for name, (results, _) in sweeps.items():
        seeds = ", ".join(map(str, results["sweep"]["sweep"]["seeds"]))
        sizes = [model["parameters_without_embeddings"] for model in results["models"].values()]
        lines.append(
            f"- [{name}](ablations/{name}/report.md): seeds {seeds}, models of "
            f"{min(sizes):,} to {max(sizes):,} parameters without embeddings."
        )
    lines += [
        "",
        "Models as small as these, trained for minutes, say nothing of large ones: the column "
        "says what was seen here.",
        "Differences are means over seeds, paired, with their 95% t-intervals; shown and "
        f"contradicted need Holm's p over all of them below {1 - LEVEL:.2g}.",
        f"Where a task has an easy control, who has less than {CONTROL} there did not learn it, "
        "which says nothing of what a state can hold.",
        f"A speed is flat that keeps more than {KEEPS} of itself.",
        "",
        "| paper | claim | figure | found | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim, finding in zip(claims, findings):
        figure = f"{claim.sweep}, {claim.task + ', ' if claim.task else ''}`{claim.figure}`"
        cells = [claim.paper, claim.claim, figure, finding.found, f"**{finding.verdict}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def start(arguments):
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="?", default=CLAIMS)
    claims = read_claims(parser.parse_args(arguments).claims)
    sweeps = read_sweeps(claims)
    findings = judge(claims, sweeps)
    out = RESULTS / "claims.md"
    out.write_text(markdown(claims, findings, sweeps), encoding="utf-8")
    for claim, finding in zip(claims, findings):
        print(f"{finding.verdict}: {claim.paper}: {claim.claim}\n    {finding.found}")
    print(f"wrote {out}")


def main():
    """Turns what the user can put right into one line."""
    run_script(start)


if __name__ == "__main__":
    main()
