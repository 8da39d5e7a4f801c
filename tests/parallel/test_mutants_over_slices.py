"""Code of slices that is broken in one place does not go unnoticed, and nothing waits for ever."""

import pytest
from mutants import MUTANTS
from processes import PATIENCE
from test_models_over_slices import TOLERANCE

SIZE = 4
# Seconds, for the one that is to wait.
SHORT = 15


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants(processes, tmp_path, mutant):
    waits = mutant == "exchanges_without_tokens"
    patience = SHORT if waits else PATIENCE
    lines, why = processes.run(tmp_path, "mutants.py", SIZE, mutant, patience=patience)
    errors = {
        line["case"]: max(line[name] for name in ("logits", "loss", "gradients")) for line in lines
    }
    if mutant == "nothing":
        assert why is None and len(errors) == 4 and max(errors.values()) < TOLERANCE, (why, errors)
    elif waits:  # for what others leave out
        assert why is not None and "process 3 was waiting\nat " in why
    else:
        assert why is None and errors[MUTANTS[mutant][1]] > 1e4 * TOLERANCE, (why, errors)
