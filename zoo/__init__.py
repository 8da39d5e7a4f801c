"""A zoo of long-sequence architectures, each a Hugging Face `PreTrainedModel`.

Importing it registers every model with transformers' Auto classes.
"""

from typing import NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .retnet import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetModel,
)

__version__ = "0.1.0"


class Architecture(NamedTuple):
    """The classes of one architecture."""

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    sequence_classifier: type[PreTrainedModel]


MODELS = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "retnet",
            RetNetConfig,
            RetNetModel,
            RetNetForCausalLM,
            RetNetForSequenceClassification,
        ),
    )
}

for _name, _config, _model, _causal_lm, _sequence_classifier in MODELS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    AutoModelForSequenceClassification.register(_config, _sequence_classifier)
