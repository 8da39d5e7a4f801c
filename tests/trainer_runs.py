"""transformers' Trainer on a model: train, evaluate, predict, best model, early stopping, resume.

python tests/trainer_runs.py SCRATCH FOLDER...    on exported folders, without importing zoo
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

STEPS = 6


class Text(torch.utils.data.Dataset):
    """Rows of random tokens, each its own labels."""

    def __init__(self, rows, seed):
        random = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 97, (rows, 24), generator=random)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def trainer_of(model, folder, **options):
    """A trainer that evaluates and saves at every second of six steps."""
    callbacks = options.pop("callbacks", [])
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,  # of five rows: the last batch is another
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **settings | options)
    return Trainer(
        model,
        arguments,
        train_dataset=Text(16, 0),
        eval_dataset=Text(5, 1),
        callbacks=callbacks,
    )


def losses(trainer, name="loss"):
    """What was logged under a name, by step."""
    return {line["step"]: line[name] for line in trainer.state.log_history if name in line}


def check(build, folder):
    """Uses a trainer as its users do.

    Args:
        build: gives the model to train, the same each time.
        folder: to write to.

    Raises:
        AssertionError: something is missing or differs.
    """
    transformers.logging.set_verbosity_error()
    whole = trainer_of(build(), folder / "run")
    whole.train()
    measured = losses(whole, "eval_loss")
    assert sorted(measured) == [2, 4, 6]
    best = min(measured.values())
    assert whole.state.best_metric == best
    # The best model is back, and evaluating and predicting say so.
    assert abs(whole.evaluate()["eval_loss"] - best) < 1e-6
    predicted = whole.predict(Text(5, 1))
    assert predicted.predictions.shape == (5, 24, 97) and predicted.label_ids.shape == (5, 24)
    assert abs(predicted.metrics["test_loss"] - best) < 1e-6

    again = trainer_of(build(), folder / "run")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    expected, found = losses(whole), losses(again)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-6
    weights = again.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert (weights[name] - value).abs().max() < 1e-6, name

    stopping = trainer_of(
        build(),
        folder / "stopping",
        learning_rate=0.0,  # nothing gets better
        save_only_model=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    stopping.train()
    assert stopping.state.global_step == 4


def main():
    """Checks exported folders, with their own code."""
    sys.modules["zoo"] = None
    from transformers import AutoModelForCausalLM

    scratch, *folders = map(Path, sys.argv[1:])
    for folder in folders:

        def build(folder=folder):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules.")
            return model

        check(build, scratch / folder.name)
        print(f"exported {folder.name} ok", flush=True)


if __name__ == "__main__":
    main()
