"""A card says what is so: metadata that the Hub takes, and no hole where a number should be."""

from string import Template

from huggingface_hub import ModelCard

from .curve import is_number
from .messages import HUB_ID, one_line
from .origin import LICENSE

# What the weights of a model may be to those of another, in the Hub's words.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
HOLE = "[More Information Needed]"  # what huggingface_hub's template has where a value is to come
OPTIONAL = {"notes"}  # what there may be nothing to say of


def check_card(text):
    """Raises a ValueError if a README.md is not what the Hub takes, or has holes.

    What can be checked without asking the Hub: the metadata are YAML that huggingface_hub reads,
    with licenses, names and figures of a known shape; and nothing was left to be filled in.
    """
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
        values = data.to_dict()
    except Exception as error:  # YAML and the model-index have many ways to be wrong
        raise ValueError(
            f"README.md has metadata that cannot be read: {one_line(error)[:200]}."
        ) from None
    for name in _as_list(values.get("license")):
        if not LICENSE.fullmatch(str(name)):
            raise ValueError(
                f"README.md has license {_short(name)}, which is no license's name on the Hub."
            )
    for name in _as_list(values.get("base_model")):
        if not HUB_ID.fullmatch(str(name)):
            raise ValueError(
                f"README.md has base_model {_short(name)}, which is no model's name on the Hub "
                "(owner/name)."
            )
    relation = values.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise ValueError(
            f"README.md has base_model_relation {_short(relation)}; the Hub knows "
            f"{', '.join(RELATIONS)}."
        )
    for name in ("tags", "datasets"):
        odd = [tag for tag in _as_list(values.get(name)) if not isinstance(tag, str) or not tag]
        if odd:
            raise ValueError(f"README.md has {name} with {_short(odd[0])}, which is no name.")
    for result in data.eval_results or []:
        if not is_number(result.metric_value):
            raise ValueError(
                f"README.md has {result.metric_type} = {_short(result.metric_value)} among its "
                "figures, which is no number."
            )
    if HOLE in text:
        raise ValueError(f"README.md still has {HOLE!r} where a value should be.")


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def _short(value):
    return repr(value)[:80]


def filled(text, **values):
    """A template with its values.

    Args:
        text: of the template.
        values: a text for each of its names.

    Raises:
        ValueError: one is missing or empty.
    """
    matches = Template.pattern.finditer(text)
    for name in {match["named"] or match["braced"] for match in matches} - {None} - OPTIONAL:
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise ValueError(f"a card needs a value for {name}, got {values.get(name)!r}.")
    return Template(text).substitute(values)


def number(name, value):
    """A number for a card, as text.

    Args:
        name: of it, for messages.
        value: the number.

    Raises:
        ValueError: it is none, or not finite, or negative.
    """
    if not is_number(value) or value < 0:
        raise ValueError(f"a card needs a number for {name}, got {value!r}.")
    return f"{value:,}"
