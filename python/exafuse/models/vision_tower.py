"""The vision tower of EXAONE 4.5: pre-norm blocks over patches, most of them inside windows.

    x += proj(attention(norm1(x)));  x += down(silu(gate(n)) * up(n)) with n = norm2(x)

One attention call per block serves all images and videos: they are segments of one packed sequence,
windows in most blocks and whole frames in the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from exafuse.config import VisionConfig
from exafuse.layers import RMSNorm
from exafuse.models.vision_layout import Grid, VisionLayout

EPS = 1e-6  # of every norm in the tower; no config names it


@dataclass(frozen=True)
class VisionOutput:
    """Fields as in transformers."""

    last_hidden_state: Tensor  # [num_patches, hidden_size], in window order, before the merger
    pooler_output: tuple[Tensor, ...]  # [tokens, out_hidden_size] of each image or video


class VisionTower(nn.Module):
    """Patch embedding, blocks, and the merger that makes tokens of the language model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(
        self, pixel_values: Tensor, grids: list[Grid], backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        """Hidden states in window order, and one token per unit in the order of the input.

        Args:
            pixel_values: ``[num_patches, patch_values]`` in any float dtype, each unit's patches
                together.
            grids: (frames, rows, columns) of patches of each image or video.
            backend: of the ops.

        Returns:
            ``[num_patches, hidden_size]`` and ``[num_patches / merge_unit, out_hidden_size]``.
        """
        layout = VisionLayout.of(grids, self.config, pixel_values.device)
        pixels = pixel_values.to(self.patch_embed.proj.weight.dtype)
        units = pixels.reshape(len(layout.order), self.config.merge_unit, -1)[layout.order]
        x, delta = self.patch_embed(units.flatten(0, 1)), None
        full = set(self.config.full_attention_blocks)
        for index, block in enumerate(self.blocks):
            segments, longest = layout.cu_windows, layout.max_window
            if index in full:
                segments, longest = layout.cu_frames, layout.max_frame
            x, delta = block(x, delta, layout, segments, longest, backend)
        tokens, x = self.merger(x, delta, backend)
        return x, tokens[layout.inverse]


class PatchEmbed(nn.Module):
    """A convolution whose kernel is one patch: a matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """``[num_patches, patch_values]`` -> ``[num_patches, hidden_size]``."""
        return F.linear(patches, self.proj.weight.flatten(1))


class VisionBlock(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, EPS)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, EPS)
        self.mlp = VisionMLP(config)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        layout: VisionLayout,
        segments: Tensor,
        longest: int,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        """``(residual, delta)`` in and out; the block's value is their sum."""
        if delta is None:
            x = backend.rms_norm(residual, self.norm1.weight, EPS)
        else:
            x, residual = backend.add_rms_norm(delta, residual, self.norm1.weight, EPS)
        attention = self.attn(x, layout, segments, longest, backend)
        x, residual = backend.add_rms_norm(attention, residual, self.norm2.weight, EPS)
        return residual, self.mlp(x, backend)


class VisionAttention(nn.Module):
    """Merged projection, 2-D RoPE and attention inside each segment, output projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, layout: VisionLayout, segments: Tensor, longest: int, backend: ModuleType
    ) -> Tensor:
        """``x [num_patches, hidden_size]`` -> the same shape."""
        out = backend.vision_attn(
            self.qkv(x),
            self.num_heads,
            self.num_kv_heads,
            layout.cos,
            layout.sin,
            segments,
            longest,
        )
        out_2d: Tensor = self.proj(out.flatten(1))
        return out_2d


class VisionMLP(nn.Module):
    """SwiGLU feed-forward with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, backend: ModuleType) -> Tensor:
        """``x [num_patches, hidden_size]`` -> the same shape."""
        out: Tensor = self.down_proj(backend.silu_and_mul(self.gate_up_proj(x)))
        return out


class PatchMerger(nn.Module):
    """Norm of each patch, then a two-layer perceptron over the patches of a unit."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.merge_unit * config.hidden_size
        self.ln_q = RMSNorm(config.hidden_size, EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, config.out_hidden_size),
        )

    def forward(
        self, residual: Tensor, delta: Tensor, backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        """``[num_units, out_hidden_size]``, and ``residual + delta``."""
        x, residual = backend.add_rms_norm(delta, residual, self.ln_q.weight, EPS)
        return self.mlp(x.view(-1, self.width)), residual
