"""Every model, over slices in two and four processes, is what it is in one process."""

import functools

import pytest
from processes import once

import zoo
from zoo.contract.subject import variants_of

NAMES = [f"{name}:{variant}" for name in zoo.MODELS for variant in variants_of(name)]
CASES = ("dense", "packed", "padded", "short", "prefill")
SIZES = (2, 4)
# Float64, in which the order of sums matters by 1e-15; largest measured: 8e-13, of gradients of
# RMT's associative memory.
TOLERANCE = 1e-10


def run_all(processes, folder, names):
    """Runs all models. A dict: what is known of each, and of one that failed, why."""
    found, names = {}, list(names)
    while names:
        results, why = processes.run(folder, "slices.py", max(SIZES), *names)
        for result in results:
            of_model = found.setdefault(result["model"], {str(size): {} for size in SIZES})
            of_model[str(result["size"])][result["case"]] = result
        if why is None:
            break
        # Those before it are done; the rest runs without it.
        failed = next((x for x in names if not is_complete(found.get(x, {}))), names[-1])
        found.setdefault(failed, {})["why"] = why
        names = names[names.index(failed) + 1 :]
    return found


def is_complete(of_model):
    return all(len(of_model.get(str(size), ())) == len(CASES) for size in SIZES)


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory, request):
    """What all processes found of all models that tests ask for: model -> slices -> case."""
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    names = [name for name in NAMES if name in asked]
    return once(tmp_path_factory, "slices", functools.partial(run_all, processes, names=names))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_slices(found, size, name):
    of_model = found.get(name, {})
    assert "why" not in of_model, f"{name}:\n{of_model['why']}"
    result = of_model[str(size)]
    assert result.keys() == set(CASES)
    errors = {
        (case, what): x
        for case, of_case in result.items()
        for what, x in of_case.items()
        if isinstance(x, float) and x > TOLERANCE
    }
    assert not errors
