"""What all trials of a fair comparison share: tokens, text, order, settings, machine."""

from collections import Counter

# What models of a task may have of their own.
OWN_KEYS = set(
    "name output_dir cache_dir architecture model learning_rate learning_rate_scales seed".split()
)
# What a trial says of where it ran.
NONE = "{}: no trial is done"
PLACE = ("device", "precision", "cpu_threads", "processes", "compiler", "versions", "git_commit")


def trial_name(trial):
    """How a trial is named in sentences."""
    rate = f"{trial['learning_rate']:g}"
    return f"{trial['model']} on {trial['task']} at {rate}, seed {trial['seed']}"


def done(results, task=None):
    """The trials that are done, of all tasks or of one."""
    trials = [trial for trial in results["trials"] if trial["status"] == "done"]
    return [trial for trial in trials if task in (None, trial["task"])]


def compare(trials, value_of, what, describe):
    """Finds the trials whose value is not that of most.

    Args:
        trials: that ought to have the same.
        value_of: (trial) -> what is compared; None: the trial does not say it.
        what: the trials are called so in sentences.
        describe: (value, usual value) -> what is wrong with a value.

    Returns:
        The usual value, None of none; sentences on trials with another; on those without.
    """
    values = [(trial, value_of(trial)) for trial in trials]
    known = [(trial, value) for trial, value in values if value is not None]
    missing = [f"{what}: {len(values) - len(known)} trials do not say it"]
    if len(known) == len(values):
        missing = [] if values else [NONE.format(what)]
    if not known:
        return None, [], missing
    usual = Counter(value for _, value in known).most_common(1)[0][0]
    others = {}
    for trial, value in known:
        if value != usual:
            said = f"{trial['model']} on {trial['task']}", describe(value, usual)
            others.setdefault(said, []).append(trial)
    wrong = []
    for (where, said), trials in others.items():
        several = f"{where}, {len(trials)} trials"
        wrong.append(f"{several if len(trials) > 1 else trial_name(trials[0])}: {said}")
    return usual, wrong, missing


def _more(found, usual):
    share = 100 * (found / usual - 1)
    return f"{abs(share):.2g}% {'more' if share > 0 else 'fewer'} tokens ({found:,}, not {usual:,})"


def _other(found, usual):
    return f"another one ({found[:8]}, not {usual[:8]})"


def same_tokens(results):
    """(wrong, missing, right) of the number of tokens that trials train on."""
    wrong, missing, right = [], [], []
    for task in results["sweep"]["tasks"]:
        usual, others, silent = compare(
            done(results, task), lambda trial: trial.get("tokens"), task, _more
        )
        wrong, missing = wrong + others, missing + silent
        right += [f"{task}: {usual:,}"] if usual else []
    return wrong, missing, "; ".join(right)


def same_text(results, key):
    """(wrong, missing, right) of the hash of the tokenizer, or of the text or synthetic task."""
    wrong, missing, right = [], [], []
    for task in results["sweep"]["tasks"]:
        usual, others, silent = compare(
            done(results, task), lambda trial: trial.get(key), task, _other
        )
        wrong, missing = wrong + others, missing + silent
        right += [f"{task}: {usual[:8]}"] if usual else []
    return wrong, missing, "; ".join(right)


def same_order(results):
    """(wrong, missing, right) of the order of data: one for each task and seed."""
    wrong, missing, count = [], [], 0
    for task in results["sweep"]["tasks"]:
        trials = done(results, task)
        missing += [] if trials else [NONE.format(task)]
        for seed in sorted({trial["seed"] for trial in trials}):
            usual, others, silent = compare(
                [trial for trial in trials if trial["seed"] == seed],
                lambda trial: trial.get("order_sha256"),
                f"{task}, seed {seed}",
                _other,
            )
            wrong, missing, count = wrong + others, missing + silent, count + bool(usual)
    return wrong, missing, f"{count} seeds and tasks, each with one order"


def same_recipe(results):
    """(wrong, missing, right) of what recipes say beside a model's fields and rates."""
    wrong, missing, own = [], [], []
    for task in results["sweep"]["tasks"]:
        trials = [trial for trial in done(results, task) if trial.get("recipe")]
        silent = len(done(results, task)) - len(trials)
        if silent or not trials:
            missing.append(
                f"{task}: {silent} trials do not say it" if silent else NONE.format(task)
            )
        for key in sorted({key for trial in trials for key in trial["recipe"]} - OWN_KEYS):
            _, others, _ = compare(
                trials,
                lambda trial: str(trial["recipe"].get(key)),  # noqa: B023  called at once
                task,
                lambda found, usual: f"{key} = {found}, not {usual}",  # noqa: B023
            )
            wrong += others
        scaled = {t["model"] for t in trials if t["recipe"].get("learning_rate_scales")}
        own += [f"{model} on {task}" for model in sorted(scaled)]
    said = f"; parameters with rates of their own: {', '.join(own)}" if own else ""
    return wrong, missing, f"the same settings for all{said}"


def same_place(results):
    """(wrong, missing, right) of device, precision, threads and versions."""
    wrong, missing, right = [], [], []
    for key in PLACE:

        def said(trial):
            value = trial.get(key, (trial.get("recipe") or {}).get(key))  # noqa: B023
            return None if value is None else str(value)

        usual, others, silent = compare(
            done(results),
            said,
            key,
            lambda found, usual: f"{key} {found}, not {usual}",  # noqa: B023
        )
        wrong += others
        right += [key] if usual else []
        missing += silent if key != "compiler" else []  # None says that there is none
    return wrong, missing, f"one value each of {', '.join(right)}"
