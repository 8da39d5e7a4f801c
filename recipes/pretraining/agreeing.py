"""What all processes of a run have to agree on before they train together."""

import datetime
import socket

import torch
from accelerate import PartialState

from .recipe import UsageError

REMEDIES = {
    "recipe": "start all of them with the same one",
    "checkpoint": "put output_dir on a disk that all of them share, or copy the run to each",
    "corpus": "give all of them the same data (data = 'stdlib' reads each one's own Python)",
    "tokenizer": "give all of them the same one",
    "weights": "give all of them the same init_from",
    "versions": "install the same ones for all of them",
}
_groups = []


def gather(value):
    """The values of all processes, by rank. It waits for the slowest, however long that takes.

    Processes call it for the first time right after they have found each other.
    """
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    if not _groups:
        # A group of its own: the training's gives up after minutes, and tokenising takes hours.
        forever = datetime.timedelta(days=30)
        _groups.append(torch.distributed.new_group(backend="gloo", timeout=forever))
    values = [None] * state.num_processes
    torch.distributed.all_gather_object(values, value, group=_groups[0])
    return values


def together(action, *arguments, gather=gather):
    """Does something in every process, and goes on only if all succeeded and found the same.

    Args:
        action: returns a result and what has to be the same for all: name of REMEDIES -> text, or
            a dictionary of which the message shows what differs.
        arguments: of `action`.
        gather: (value) -> the values of all processes, by rank.

    Returns:
        This process's result.

    Raises:
        UsageError: in all processes, with the same message.
    """
    result, facts, error, failure = None, {}, None, None
    try:
        result, facts = action(*arguments)
    except UsageError as caught:
        error = str(caught)
    except Exception as caught:
        error, failure = " ".join(f"{type(caught).__name__}: {caught}".split()), caught
    answers = gather((error, facts, socket.gethostname()))
    if failure:
        raise failure  # with its traceback, where it happened
    hosts = [host for _, _, host in answers]
    errors = [error for error, _, _ in answers]
    if any(errors):
        raise UsageError(_by_process(errors, hosts))
    for name in facts:
        values = _shown([facts[name] for _, facts, _ in answers])
        if len(set(values)) > 1:
            raise UsageError(
                f"the processes differ in their {name} ({_by_process(values, hosts)}); "
                f"{REMEDIES[name]}."
            )
    return result


def _shown(values):
    """Texts that are the same if the values are."""
    if not isinstance(values[0], dict):
        return values
    keys = sorted({key for value in values for key in value})
    keys = [k for k in keys if any(value.get(k) != values[0].get(k) for value in values)]
    return [", ".join(f"{key} = {value.get(key)!r}" for key in keys) for value in values]


def _by_process(texts, hosts):
    """Each text once, after the processes that it is from; alone if it is from all."""
    if len(set(texts)) == 1:
        return texts[0]
    parts = []
    for text in dict.fromkeys(text for text in texts if text is not None):
        ranks = [rank for rank, other in enumerate(texts) if other == text]
        where = sorted({hosts[rank] for rank in ranks})
        on = f" on {', '.join(where)}" if len(set(hosts)) > 1 else ""
        shown = ", ".join(map(str, ranks))
        parts.append(f"process{'es' if len(ranks) > 1 else ''} {shown}{on}: {text}")
    return "; ".join(parts)
