"""What a study found: results.json from its readings, and the tables that are a function of it."""

from dataclasses import asdict

from ablating.statistics import interval
from pretraining.building import REPOSITORY
from pretraining.reporting import environment, write_json

RESULTS = "results.json"
OVERVIEW = (
    "Share of answers with all digits right and, in brackets, of digits, means over seeds and "
    "distances. Columns: segments of a document: segments from the key's to the question's"
)
MEASURES = "in_context", "by_distance", "by_segment", "digits_by_segment"


def collect(study, readings, corpus):
    """All figures of a study by way, measure and seed, as results.json has them.

    Args:
        study: a `Study`.
        readings: all of its `Reading`s.
        corpus: hash of the text that losses are of; None: there is none.
    """
    table = {k: v for k, v in asdict(study).items() if k not in ("ways", "output_dir")}
    if study.segment_length:
        table["segment_length"] = study.segment_length
    ways, missing = {}, {}  # way, task and why there is nothing -> seeds
    for name, way in study.ways.items():
        found = {"trials": {}, **{measure: {} for measure in MEASURES}}
        for reading in [r for r in readings if r.name == name]:
            figures = reading.figures()
            if figures is None:
                why = reading.why_not() or "it was not measured"
                missing.setdefault((name, reading.task, why), []).append(str(reading.seed))
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
        "missing": [
            f"{name} on {task}, seed {', '.join(seeds)}: {why}"
            for (name, task, why), seeds in missing.items()
        ],
    }


def save(study, results):
    """Writes results.json."""
    write_json(study.folder / RESULTS, results)


def points(values):
    """Figures of one seed as (x, y)."""
    return [(int(key), value) for key, value in values.items()]


def curves(way, measure, length=None):
    """The figures of a way as lists of (x, y), by seed.

    Args:
        way: of results.json.
        measure: one of MEASURES.
        length: of the documents, in tokens, where a measure has figures for each; else None.
    """
    found = way.get(measure, {}).items()  # studies before it was measured do not have it
    return {seed: points(values[str(length)] if length else values) for seed, values in found}


def cells(way, measure, since=None, length=None):
    """The `Interval` over seeds of each figure of a way, by number.

    Args:
        way, measure, length: as of `curves`.
        since: the number whose figure is taken off the others, seed by seed; None: none is.
    """
    by_seed = {seed: dict(curve) for seed, curve in curves(way, measure, length).items()}
    if since is not None:
        by_seed = {
            seed: {n: value - found[since] for n, value in found.items() if n != since}
            for seed, found in by_seed.items()
        }
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
        lines += ["Bits per byte of the same text, by tokens of context", ""]
        lines += _table(results, "in_context", heads, 3)
        lines += ["", f"What more than {trained:,} tokens add to that, paired by seed", ""]
        lines += _table(results, "in_context", heads[1:], 3, since=trained)
    size = study.get("segment_length")
    if study["recall"] and not size:
        heads = [f"{n:,}" for n in study["distances"]]
        lines += ["", "Share of digits that are right, by tokens from key to question"]
        lines += ["", *_table(results, "by_distance", heads, 2)]
    if size:
        lines += ["", OVERVIEW, "", *overview(results)]
    for length in study["lengths"] if size else []:
        heads = [str(n) for n in study["distances"] if n < length // size]
        what = f"Share of answers with all digits right, in {documents(study, length)}"
        lines += ["", f"{what}, by segments from the key's to the question's"]
        lines += ["", *_table(results, "by_segment", heads, 2, length=length)]
    lines += ["", *(f"- missing: {one}" for one in results["missing"])]
    return "\n".join(lines).strip() + "\n"


def spans(study):
    """The columns of `overview`: (tokens of the documents, the distances of a column).

    Up to the trained length, and by as much again for every doubling.
    """
    counts = [length // study["segment_length"] for length in study["lengths"]]
    trained, *_ = counts
    ends = [trained * 2**n for n in range(counts[-1].bit_length()) if trained * 2**n <= counts[-1]]
    found = []
    for length, count in zip(study["lengths"], counts):
        begins = [0, 1, 2] if count == trained else [1]
        edges = [*begins, *(end for end in ends if end < count), count]
        for low, high in zip(edges, edges[1:]):
            found.append((length, [d for d in study["distances"] if low <= d < high]))
    return [(length, distances) for length, distances in found if distances]


def overview(results):
    """The table of recall by segments in few columns, as lines of Markdown."""
    study, columns = results["study"], spans(results["study"])
    heads = []
    for length, (first, *more) in columns:
        back = f"{first} to {more[-1]}" if more else str(first)
        heads.append(f"{length // study['segment_length']}: {back}")
    lines = ["| | " + " | ".join(heads) + " | seeds |", "|---|" + "---:|" * (len(heads) + 1)]
    for name, way in results["ways"].items():
        if way["by_segment"]:
            shown = [
                f"{_mean(way, 'by_segment', *column)} ({_mean(way, 'digits_by_segment', *column)})"
                for column in columns
            ]
            lines.append(f"| {name} | {' | '.join(shown)} | {len(way['by_segment'])} |")
    return lines


def _mean(way, measure, length, distances):
    found = cells(way, measure, length=length)
    return f"{sum(found[n].mean for n in distances) / len(distances):.2f}"


def documents(study, length):
    """What documents of so many tokens are called."""
    count = f"documents of {length // study['segment_length']} segments"
    return count + " (as in training)" * (length == study["lengths"][0])


def _table(results, measure, heads, digits, since=None, length=None):
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, way in results["ways"].items():
        found = cells(way, measure, since, length)
        if found:
            sign = "" if since is None else "+"
            shown = [_cell(one, digits, sign) for one in found.values()]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def _cell(found, digits, sign):
    mean = f"{found.mean:{sign}.{digits}f}"
    return mean if found.half is None else f"{mean} ± {found.half:.{digits}f}"
