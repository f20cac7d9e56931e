"""exafuse: EXAONE 4, Qwen2 and Llama checkpoints on hand-written CUDA kernels.

``from_pretrained`` loads a checkpoint folder or Hub name, ``ops`` holds the kernels as functions,
``reference`` the same functions in plain PyTorch, ``verify`` compares the two and transformers.
Importing the package loads nothing heavy: every name below is resolved at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exafuse.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    ExafuseError,
    MediaError,
    TemplateError,
)

if TYPE_CHECKING:
    from exafuse import ops, reference
    from exafuse.integrations.monkey_patching import (
        patch_transformers,
        patched_transformers,
        unpatch_transformers,
    )
    from exafuse.integrations.patching import patch, patched, unpatch
    from exafuse.integrations.processors import PresencePenalty
    from exafuse.models import from_config, from_pretrained
    from exafuse.ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from exafuse.text.chat import chat
    from exafuse.text.loading import load_processor
    from exafuse.verification.verify import verify

__version__ = "0.1.0"

_LAZY = {
    "PresencePenalty": "exafuse.integrations.processors",
    "chat": "exafuse.text.chat",
    "flash_attn_func": "exafuse.ops",
    "flash_attn_varlen_func": "exafuse.ops",
    "flash_attn_with_kvcache": "exafuse.ops",
    "from_config": "exafuse.models",
    "from_pretrained": "exafuse.models",
    "load_processor": "exafuse.text.loading",
    "ops": "exafuse.ops",
    "patch": "exafuse.integrations.patching",
    "patch_transformers": "exafuse.integrations.monkey_patching",
    "patched": "exafuse.integrations.patching",
    "patched_transformers": "exafuse.integrations.monkey_patching",
    "reference": "exafuse.reference",
    "unpatch": "exafuse.integrations.patching",
    "unpatch_transformers": "exafuse.integrations.monkey_patching",
    "verify": "exafuse.verification.verify",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DoesNotFitError",
    "ExafuseError",
    "MediaError",
    "PresencePenalty",
    "TemplateError",
    "__version__",
    "chat",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "from_config",
    "from_pretrained",
    "load_processor",
    "ops",
    "patch",
    "patch_transformers",
    "patched",
    "patched_transformers",
    "reference",
    "unpatch",
    "unpatch_transformers",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'exafuse' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"exafuse.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
