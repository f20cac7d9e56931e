"""The models of every family, and the two ways to one: a checkpoint or a config."""

from exafuse.models.loading import from_config, from_pretrained

__all__ = ["from_config", "from_pretrained"]
