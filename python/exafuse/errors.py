"""Every exception that exafuse raises on purpose.

Each message names what was expected, what came, and what to do about it. Wrong arguments to an op
or a method are plain ``ValueError`` / ``TypeError``; the classes here are for things that come
from outside.
"""

from __future__ import annotations


class ExafuseError(Exception):
    """Base of the exceptions below: ``except exafuse.ExafuseError`` catches them all."""


class ConfigError(ExafuseError, ValueError):
    """config.json or generation_config.json is malformed, contradictory or unsupported."""


class CheckpointError(ExafuseError, ValueError):
    """A weight file, an index or the set of tensors in a checkpoint folder is not what it must
    be."""


class TemplateError(ExafuseError, ValueError):
    """A chat template or tokenizer cannot be loaded or cannot render the conversation."""


class MediaError(ExafuseError, ValueError):
    """An image or a video cannot be read, or is larger than what is accepted."""


class DoesNotFitError(ExafuseError, MemoryError):
    """Weights or cache do not fit the free memory of the target device; raised before anything is
    read."""


class BackendError(ExafuseError, RuntimeError):
    """The requested backend cannot run here (no extension, no GPU, wrong architecture)."""
