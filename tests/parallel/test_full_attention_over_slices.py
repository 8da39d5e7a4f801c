"""Full attention by heads over slices is what it is in one process."""

import pytest
from heads import MODELS
from processes import once
from test_models_over_slices import TOLERANCE

SIZE = 4


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """What all processes found."""

    def run(folder):
        lines, why = processes.run(folder, "heads.py", SIZE)
        assert why is None, why
        return lines

    return once(tmp_path_factory, "heads", run)


@pytest.mark.parametrize("case", ["dense", "packed", "padded", "short"])
@pytest.mark.parametrize("name", MODELS)
def test_by_heads(found, name, case):
    (of_case,) = (x for x in found if x["model"] == name and x["case"] == case)
    assert of_case["traffic"]["all_to_all"] > 0
    assert max(of_case[what] for what in ("logits", "loss", "gradients")) < TOLERANCE, of_case
