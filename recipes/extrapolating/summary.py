"""What a study found: results.json from its readings, and the tables that are a function of it."""

from dataclasses import asdict

from ablating.statistics import interval
from pretraining.building import REPOSITORY
from pretraining.reporting import environment, write_json

RESULTS = "results.json"
MEASURES = "in_context", "by_distance"


def collect(study, readings, corpus):
    """All figures of a study by way, measure and seed, as results.json has them.

    Args:
        study: a `Study`.
        readings: all of its `Reading`s.
        corpus: hash of the text that losses are of; None: there is none.
    """
    table = {k: v for k, v in asdict(study).items() if k not in ("ways", "output_dir")}
    ways, missing = {}, []
    for name, way in study.ways.items():
        found = {"trials": {}, **{measure: {} for measure in MEASURES}}
        for reading in [r for r in readings if r.name == name]:
            figures = reading.figures()
            if figures is None:
                why = reading.why_not() or "it was not measured"
                missing.append(f"{name} on {reading.task}, seed {reading.seed}: {why}")
                continue
            found["trials"].setdefault(reading.task, {})[str(reading.seed)] = reading.trial.hash
            for measure, values in figures.items():
                found[measure][str(reading.seed)] = values
        ways[name] = {**asdict(way), **found}
    return {
        "study": table,
        "corpus_sha256": corpus,
        **environment(REPOSITORY),
        "ways": ways,
        "missing": missing,
    }


def save(study, results):
    """Writes results.json."""
    write_json(study.folder / RESULTS, results)


def points(values):
    """Figures of one seed as (x, y)."""
    return [(int(key), value) for key, value in values.items()]


def cells(way, measure):
    """The `Interval` over seeds of each figure of a way, by number."""
    by_seed = {seed: dict(points(values)) for seed, values in way[measure].items()}
    numbers = next(iter(by_seed.values()), {})
    return {n: interval({seed: found[n] for seed, found in by_seed.items()}) for n in numbers}


def markdown(results):
    """The tables of a study: losses of the same targets by context, then recall by distance."""
    study, lines = results["study"], []
    trained = study["lengths"][0]
    if study["text"]:
        heads = [
            f"{n:,} ({n // trained} L)" if n % trained == 0 else f"{n:,}" for n in study["lengths"]
        ]
        lines += [f"Bits per byte of the same {trained:,} bytes, by bytes of context", ""]
        lines += _table(results, "in_context", heads, 3)
    if study["recall"]:
        heads = [f"{n:,}" for n in study["distances"]]
        lines += ["", "Share of a key's digits that are right, by bytes between key and question"]
        lines += ["", *_table(results, "by_distance", heads, 2)]
    lines += ["", *(f"- missing: {one}" for one in results["missing"])]
    return "\n".join(lines).rstrip() + "\n"


def _table(results, measure, heads, digits):
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, way in results["ways"].items():
        found = cells(way, measure)
        if found:
            shown = [_cell(one, digits) for one in found.values()]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def _cell(found, digits):
    if found.half is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"
