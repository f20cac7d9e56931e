"""config.json -> ModelConfig: the one place where a checkpoint's description is read."""

from exafuse.config.head import HeadConfig
from exafuse.config.layer_plan import LayerPlan
from exafuse.config.model import ModelConfig
from exafuse.config.reading import load_config
from exafuse.config.rope import RopeConfig
from exafuse.config.vision import VisionConfig

__all__ = ["HeadConfig", "LayerPlan", "ModelConfig", "RopeConfig", "VisionConfig", "load_config"]
