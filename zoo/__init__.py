"""A zoo of long-sequence architectures, each a Hugging Face `PreTrainedModel`.

Importing it registers every model with transformers' Auto classes.
"""

from typing import NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

# The contents: what each file's `__all__` names is here, and the architecture in MODELS.
from .models.retnet import *  # Sun et al. 2023: a retention, which forgets at fixed rates
from .models.rwkv4 import *  # Peng et al. 2023: RWKV-4, a decay and a bonus per channel
from .models.rwkv5 import *  # Peng et al. 2024: Eagle, states that are matrices
from .models.rwkv6 import *  # Peng et al. 2024: Finch, decays that depend on the text
from .models.rwkv7 import *  # Peng et al. 2025: Goose, a generalised delta rule
from .models.gated_deltanet import *  # Yang et al. 2024: a gate and the delta rule
from .models.lightning import *  # Qin et al. 2024: Lightning Attention-2, hybrids
from .models.infini import *  # Munkhdalai et al. 2024: a compressive memory of past segments
from .models.landmark import *  # Mohtashami and Jaggi 2023: landmarks that stand for blocks
from .models.sliding_window import *  # Jiang et al. 2023: Mistral 7B; attention sinks
from .models.block_recurrent import *  # Hutchins et al. 2022: a cell that reads windows
from .models.rmt import *  # Bulatov et al. 2022: tokens of memory from segment to segment; ARMT
from .models.longnet import *  # Ding et al. 2023: dilated attention
from .models.transformer_xl import *  # Dai et al. 2019: a memory of the segment before
from .models.long_llama import *  # Tworkowski et al. 2023: raw keys of all earlier windows

from .core.joining import join_states  # of several texts' caches, one

__version__ = "0.1.0"


class Architecture(NamedTuple):
    """The classes of one architecture."""

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    sequence_classifier: type[PreTrainedModel]
    token_classifier: type[PreTrainedModel]
    question_answerer: type[PreTrainedModel]


# What the classes of an architecture are called after its name, and what loads each.
_PARTS = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}


def _architectures():
    """What the contents name: a config, and the classes whose names begin like its own."""
    for config in tuple(globals().values()):
        name = getattr(config, "model_type", "")
        if name.startswith("zoo_"):
            stem = config.__name__.removesuffix("Config")
            classes = [globals()[stem + part] for part in _PARTS]
            yield Architecture(name.removeprefix("zoo_"), config, *classes)


MODELS: dict[str, Architecture] = {x.name: x for x in _architectures()}
__all__ = ["MODELS", "Architecture", "__version__", "join_states"]

for _name, _config, *_classes in MODELS.values():
    AutoConfig.register(_config.model_type, _config)
    for _auto, _class in zip(_PARTS.values(), _classes, strict=True):
        _auto.register(_config, _class)
    __all__ += [x.__name__ for x in (_config, *_classes)]
