"""Two tokenizers of the kinds that checkpoints bring, small and trained on the spot."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Stop here. Stopping is what a stop string is for; \n\nUser: go on.",
    "print('hello')\nreturn x + 1\n```\n",
    "대한민국의 수도는 서울입니다. 오늘 날씨가 좋네요.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|end|>"]


def byte_level(vocab_size: int = 360) -> PreTrainedTokenizerFast:
    """As in Qwen2, Llama 3 and EXAONE: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


def byte_fallback(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As in Llama 2: BPE over characters, spaces as U+2581, bytes for unknown text."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = _spaces_marked()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL + bytes_,
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS[:3], trainer)  # the Korean text falls back to bytes
    tokenizer = Tokenizer(_with_byte_fallback(trained))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = _spaces_marked()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(tokenizer)


def _spaces_marked() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def _with_byte_fallback(trained: Tokenizer) -> models.BPE:
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return models.BPE(model["vocab"], merges, byte_fallback=True, fuse_unk=True)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
