"""The models of every family, and the two ways to one: a checkpoint or a config."""

from exafuse.models.causal_lm import CausalLM
from exafuse.models.heads import (
    BaseModel,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from exafuse.models.loading import from_config, from_pretrained

__all__ = [
    "BaseModel",
    "CausalLM",
    "QuestionAnswerer",
    "SequenceClassifier",
    "TokenClassifier",
    "from_config",
    "from_pretrained",
]
