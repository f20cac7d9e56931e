"""Qwen2: Llama's layer; q, k and v carry biases and late layers may slide, both said by the
config."""

from __future__ import annotations

from exafuse.models.llama import PreNormLayer

__all__ = ["PreNormLayer"]
