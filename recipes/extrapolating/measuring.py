"""What is measured of one trial read in one way: losses of text, or recall by distance."""

import dataclasses

import torch

from pretraining.building import build_config, build_model, tokenizer_of
from pretraining.comparing import bits_per_byte_by_context
from pretraining.corpus import Tokens
from pretraining.recipe import UsageError
from scoring.measures import Here
from tasks import load

HERE = Here(torch.device("cpu"))


class Models:
    """A trial's weights under the configs of a way, each of which is built once.

    Args:
        study: a `Study`.
        trial: a `Trial` that is done.
        way: a `Way`.
    """

    def __init__(self, study, trial, way):
        self.study, self.trial, self.way = study, trial, way
        self._fields, self._model = None, None

    def recipe(self, length):
        """The trial's recipe with the way's fields, for texts of so many tokens."""
        model = merged(self.trial.recipe.model, self.study.changed(self.way, length))
        return dataclasses.replace(self.trial.recipe, model=model)

    def of(self, length):
        """The model for texts of so many tokens.

        Raises:
            UsageError: fields that the architecture refuses, or that need other weights.
        """
        recipe = self.recipe(length)
        if recipe.model != self._fields:
            config = build_config(recipe, tokenizer_of(recipe))
            self._model = build_model(recipe, config, self.trial.run_folder).eval()
            self._fields = recipe.model
            if self.way.attention:
                self._model.set_attn_implementation(self.way.attention)
        return self._model


def merged(fields, changed):
    """Fields of a config with others in their places; tables are merged, "none" takes one out."""
    found = dict(fields)
    for key, value in changed.items():
        is_table = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if is_table else value
    return found


def check(study, trial, way):
    """Raises a UsageError if a way does not fit a trial's model, before anything is measured."""
    models = Models(study, trial, way)
    for length in study.lengths:
        recipe = models.recipe(length)
        build_config(recipe, tokenizer_of(recipe))


def losses(study, trial, way, held_out):
    """Bits per byte of the same targets, at the end of texts of each length.

    In a causal model this is the loss by position too: what a text is followed by changes nothing.

    Args:
        study, trial, way: as of `Models`.
        held_out: the `Tokens` that the trial did not train on.

    Returns:
        "in_context": length -> bits.

    Raises:
        UsageError: too little text.
    """
    longest, first, num_tokens = study.lengths[-1], study.first, len(held_out.ids)
    after = first + study.places * longest + 1
    if num_tokens < after:
        raise UsageError(
            f"{study.text} holds out {num_tokens} tokens, and first and places need {after}; set "
            f"a larger eval_bytes in {study.sweep}."
        )
    starts = held_out.starts[(held_out.starts >= first) & (held_out.starts < after)] - first
    # A token stands for as many bytes as in all the text.
    num_bytes = held_out.num_bytes * (after - first - 1) / held_out.num_targets
    tokens = Tokens(held_out.ids[first:after], starts, num_bytes)
    models, packing, found = Models(study, trial, way), trial.recipe.packing, {}
    for length in study.lengths:
        bits = bits_per_byte_by_context(
            HERE, models.of(length), tokens, [length], longest, packing, among=study.lengths
        )
        found[str(length)] = bits[length]
    return {"in_context": found}


@torch.inference_mode()
def recall(study, trial, way):
    """The share of digits that are right, by distance.

    Documents fill the first of the study's lengths that holds them, so that keys lie far from the
    beginning as well, where sinks would see them.

    Returns:
        "by_distance": distance -> share.
    """
    models, task = Models(study, trial, way), load(trial.recipe.task)
    by_distance = {}
    for distance, length in study.example_lengths(trial.recipe).items():
        settings, whose = {"length": length, "distance": distance}, ["extrapolation", distance]
        size = max(1, study.lengths[-1] // length)  # as many tokens at once as in the longest text
        right_BN = right(models.of(length), task, whose, settings, study.examples, size)
        by_distance[str(distance)] = right_BN.double().mean().item()
    return {"by_distance": by_distance}


@torch.inference_mode()
def recall_by_segment(study, trial, way):
    """The share of answers of which all digits are right, and that of digits, by segments back.

    Returns:
        "by_segment" and "digits_by_segment": tokens of the documents -> segments from the key's to
        the question's -> share.
    """
    models, task = Models(study, trial, way), load(trial.recipe.task)
    at_once = max(study.lengths[-1], trial.recipe.batch_size * task.length)
    answers, digits = {}, {}
    for length in study.lengths:
        answers[str(length)], digits[str(length)] = {}, {}
        for back in study.segments_back(length):
            settings = {"segments": length // study.segment_length, "back": back}
            of = models.of(length), task, ["extrapolation"], settings
            right_BN = right(*of, study.examples, at_once // length)
            answers[str(length)][str(back)] = right_BN.all(-1).double().mean().item()
            digits[str(length)][str(back)] = right_BN.double().mean().item()
    return {"by_segment": answers, "digits_by_segment": digits}


def right(model, task, whose, settings, examples, size):
    """Which digits are the likeliest tokens, each given those before it: [examples, digits].

    Args:
        model: a causal model.
        task: of keys in filler.
        whose, settings: of the examples, as `Task.examples` has them.
        examples: how many.
        size: examples at once.
    """
    found = []
    for first in range(0, examples, size):
        batch = task.examples(whose, settings, first, min(size, examples - first))
        targets_BN = batch["shift_labels"][:, -task.digits :]
        logits = model(batch["input_ids"], use_cache=False, logits_to_keep=task.digits).logits
        found.append(logits.argmax(-1) == targets_BN)
    return torch.cat(found)
