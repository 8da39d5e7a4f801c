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

from .models.block_recurrent import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    BlockRecurrentForSequenceClassification,
    BlockRecurrentModel,
)
from .models.infini import (
    InfiniConfig,
    InfiniForCausalLM,
    InfiniForSequenceClassification,
    InfiniModel,
)
from .models.lightning import (
    LightningConfig,
    LightningForCausalLM,
    LightningForSequenceClassification,
    LightningModel,
)
from .models.longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetModel,
)
from .models.retnet import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetModel,
)
from .models.rwkv4 import (
    RWKV4Config,
    RWKV4ForCausalLM,
    RWKV4ForSequenceClassification,
    RWKV4Model,
)
from .models.rwkv5 import (
    RWKV5Config,
    RWKV5ForCausalLM,
    RWKV5ForSequenceClassification,
    RWKV5Model,
)
from .models.rwkv6 import (
    RWKV6Config,
    RWKV6ForCausalLM,
    RWKV6ForSequenceClassification,
    RWKV6Model,
)
from .models.rwkv7 import (
    RWKV7Config,
    RWKV7ForCausalLM,
    RWKV7ForSequenceClassification,
    RWKV7Model,
)
from .models.sliding_window import (
    SlidingWindowConfig,
    SlidingWindowForCausalLM,
    SlidingWindowForSequenceClassification,
    SlidingWindowModel,
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
        Architecture(
            "rwkv4",
            RWKV4Config,
            RWKV4Model,
            RWKV4ForCausalLM,
            RWKV4ForSequenceClassification,
        ),
        Architecture(
            "rwkv5",
            RWKV5Config,
            RWKV5Model,
            RWKV5ForCausalLM,
            RWKV5ForSequenceClassification,
        ),
        Architecture(
            "rwkv6",
            RWKV6Config,
            RWKV6Model,
            RWKV6ForCausalLM,
            RWKV6ForSequenceClassification,
        ),
        Architecture(
            "rwkv7",
            RWKV7Config,
            RWKV7Model,
            RWKV7ForCausalLM,
            RWKV7ForSequenceClassification,
        ),
        Architecture(
            "lightning",
            LightningConfig,
            LightningModel,
            LightningForCausalLM,
            LightningForSequenceClassification,
        ),
        Architecture(
            "infini",
            InfiniConfig,
            InfiniModel,
            InfiniForCausalLM,
            InfiniForSequenceClassification,
        ),
        Architecture(
            "sliding_window",
            SlidingWindowConfig,
            SlidingWindowModel,
            SlidingWindowForCausalLM,
            SlidingWindowForSequenceClassification,
        ),
        Architecture(
            "block_recurrent",
            BlockRecurrentConfig,
            BlockRecurrentModel,
            BlockRecurrentForCausalLM,
            BlockRecurrentForSequenceClassification,
        ),
        Architecture(
            "longnet",
            LongNetConfig,
            LongNetModel,
            LongNetForCausalLM,
            LongNetForSequenceClassification,
        ),
    )
}

for _name, _config, _model, _causal_lm, _sequence_classifier in MODELS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    AutoModelForSequenceClassification.register(_config, _sequence_classifier)
