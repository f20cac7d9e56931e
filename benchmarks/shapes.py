"""Sizes of the models, and of the cases that are measured on each kind of device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """What the kernels of one decoder see.

    ``post_norm``: residual + norm(sublayer) as in EXAONE 4, else norm(residual + sublayer).
    ``window`` counts the tokens a query of a sliding layer sees, itself included.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    post_norm: bool = False
    qk_norm: bool = False
    window: int | None = None
    sliding_layers: int = 0

    def kv_bytes(self, tokens: int, element: int = 2) -> int:
        """Keys and values of ``tokens`` tokens in one layer."""
        return 2 * tokens * self.num_kv_heads * self.head_dim * element

    def cache_bytes(self, context: int, rings: bool, chunk: int = 2048) -> int:
        """The cache of one sequence, with rings on sliding layers or every token everywhere."""
        full = self.num_layers * self.kv_bytes(context)
        if not rings or self.window is None:
            return full
        slots = min(context, -(-(self.window - 1 + chunk) // 128) * 128)
        kept = (self.num_layers - self.sliding_layers) * self.kv_bytes(context)
        return kept + self.sliding_layers * self.kv_bytes(slots)


@dataclass(frozen=True)
class VisionShape:
    """The attention of a vision tower: ``window`` tokens a segment in all but the full layers."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int


EXAONE_32B = ModelShape(
    *("EXAONE-4.0-32B", 5120, 27392, 40, 8, 128, 64),
    post_norm=True,
    qk_norm=True,
    window=4096,
    sliding_layers=48,
)
EXAONE_1_2B = ModelShape(
    *("EXAONE-4.0-1.2B", 2048, 4096, 32, 8, 64, 30), post_norm=True, qk_norm=True
)
LLAMA_3_8B = ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128, 32)
QWEN2_7B = ModelShape("Qwen2-7B", 3584, 18944, 28, 4, 128, 28)
MODELS = (EXAONE_32B, EXAONE_1_2B, LLAMA_3_8B, QWEN2_7B)

EXAONE_VISION = VisionShape("EXAONE-4.5 vision", 32, 8, 64, 64)
QWEN_VISION = VisionShape("Qwen2.5-VL vision", 16, 16, 80, 64)
VISION = (EXAONE_VISION, QWEN_VISION)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are. ``window`` replaces the models' own where contexts are short."""

    models: tuple[ModelShape, ...]
    tokens: tuple[int, ...]  # of the ops that work token by token
    prefill: tuple[int, ...]  # sequence lengths
    chunks: tuple[tuple[int, int], ...]  # (queries, keys): a chunk of a long prompt
    packed: tuple[int, ...]  # lengths of sequences in one packed call
    decode: tuple[tuple[int, int], ...]  # (batch, context)
    drafts: tuple[tuple[int, int], ...]  # (queries, context): speculative decoding
    vision_tokens: int
    window: int | None = None

    def window_of(self, model: ModelShape) -> int | None:
        """The window of the model's sliding layers in these cases."""
        return None if model.window is None else self.window or model.window


_SIZES = {
    ("cuda", False): Sizes(
        models=MODELS,
        tokens=(1, 8192),
        prefill=(2048, 8192, 32768),
        chunks=((512, 32768),),
        packed=(4096, 2048, 1024, 512, 512),
        decode=((1, 1024), (1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (32, 4096)),
        drafts=((4, 32768),),
        vision_tokens=16384,
    ),
    ("cuda", True): Sizes(
        models=(EXAONE_32B, EXAONE_1_2B),
        tokens=(1, 8192),
        prefill=(2048, 8192),
        chunks=(),
        packed=(2048, 1024, 512, 512),
        decode=((1, 4096), (1, 32768), (8, 4096)),
        drafts=((4, 32768),),
        vision_tokens=4096,
    ),
    ("cpu", False): Sizes(
        models=MODELS,
        tokens=(1, 256),
        prefill=(128, 256, 512, 1024),
        chunks=((64, 1024),),
        packed=(256, 128, 64),
        decode=((1, 512), (1, 2048), (4, 512)),
        drafts=((4, 1024),),
        vision_tokens=1024,
        window=256,
    ),
    ("cpu", True): Sizes(
        models=(EXAONE_32B, EXAONE_1_2B),
        tokens=(1, 16),
        prefill=(32, 64, 128),
        chunks=((16, 128),),
        packed=(64, 32, 16),
        decode=((1, 128), (1, 512), (2, 128)),
        drafts=((4, 128),),
        vision_tokens=128,
        window=32,
    ),
}


def sizes(device: str, quick: bool) -> Sizes:
    """The cases of a kind of device; ``quick`` ones are few, and small on a CPU."""
    return _SIZES["cuda" if device == "cuda" else "cpu", quick]
