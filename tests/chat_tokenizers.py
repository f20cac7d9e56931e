"""Small tokenizers for the chat tests: byte-level BPE trained on the text below, with the added
tokens and a chat template in the style of each family."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from exafuse.text.chat import load_processor
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEMPLATES = Path(__file__).parent / "data" / "templates"

TEXT = """
The ferry leaves the harbour at seven, and the gulls follow it past the lighthouse.
How many apples are left if a farmer sells three of every five baskets? Show the steps.
A function takes a name and returns the weather: {"city": "Seoul", "degrees": 21, "rain": false}.
It rained all week; on Sunday the market opened again and everybody bought persimmons.
배는 일곱 시에 항구를 떠나고 갈매기들이 등대를 지나 따라온다.
농부가 다섯 바구니 가운데 세 바구니를 팔면 사과는 몇 개가 남을까요? 풀이를 보여 주세요.
서울의 날씨를 알려 주는 함수는 도시 이름을 받아 기온과 비 소식을 돌려준다.
일주일 내내 비가 내렸고, 일요일에 시장이 다시 열리자 모두 감을 샀다.
"""


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's text front end."""

    template: str
    special: tuple[str, ...]
    markers: tuple[str, ...] = ()  # added tokens that are not flagged special
    eos: str = ""
    bos: str | None = None
    prepends_bos: bool = False


FAMILIES = {
    "exaone4": Family(
        template="exaone4.jinja",
        special=(
            *("[PAD]", "[BOS]", "[EOS]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]"),
            "[|endofturn|]",
        ),
        markers=(
            *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_result>"),
            *("</tool_result>", "<tool>", "</tool>", "PI:EMAIL"),
        ),
        eos="[|endofturn|]",
        bos="[BOS]",
    ),
    "qwen2": Family(
        template="chatml.jinja",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        markers=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        eos="<|im_end|>",
    ),
    "llama3": Family(
        template="llama3.jinja",
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"),
        ),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        prepends_bos=True,
    ),
}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer.to_str()


def byte_level(family: Family) -> Tokenizer:
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.normalizer = normalizers.NFC()
    specials = [AddedToken(text, normalized=False, special=True) for text in family.special]
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in family.markers])
    if family.prepends_bos:
        bos = tokenizer.token_to_id(family.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bos)]
        )
    return tokenizer


def drops_zero_width() -> Tokenizer:
    """Matches its added tokens on normalised text, which has no zero-width characters."""
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex("[\u200b\u200c\u200d\ufeff]"), "")]
    )
    tokens = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, normalized=True, special=True) for t in tokens])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in ("<tool_call>", "PI:EMAIL")])
    tokenizer.add_tokens([AddedToken("PING", normalized=True, single_word=True)])
    return tokenizer


def begins_with_blank() -> Tokenizer:
    """As sentencepiece vocabularies do: a blank in front of the text, blanks written as U+2581."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *single_bytes], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    # The byte pieces are ordinary vocabulary, not added tokens.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokens = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens])
    return tokenizer


def save(
    tokenizer: Tokenizer,
    folder: Path,
    template: str | None,
    **config: Any,
) -> Path:
    """A checkpoint folder with tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def save_family(
    name: str, folder: Path, template: str | None = None, markers: tuple[str, ...] = ()
) -> Path:
    """``template``: a file name of TEMPLATES or a template; ``markers``: more added tokens."""
    family = FAMILIES[name]
    family = replace(family, markers=family.markers + markers)
    template = template or family.template
    is_file = template.endswith(".jinja")
    source = (TEMPLATES / template).read_text() if is_file else template
    tokens = {"eos_token": family.eos, "bos_token": family.bos, "pad_token": family.special[0]}
    return save(byte_level(family), folder, source, **tokens)


@cache
def processor(name: str) -> Any:
    """The loaded tokenizer of a family, or one of the special cases below."""
    joined = (TEMPLATES / "joined.jinja").read_text()
    with TemporaryDirectory() as folder:
        path = Path(folder)
        if name in FAMILIES:
            save_family(name, path)
        elif name in ("drops_zero_width", "begins_with_blank"):
            tokenizer = drops_zero_width() if name == "drops_zero_width" else begins_with_blank()
            save(tokenizer, path, joined)
        else:  # another template on a family's vocabulary
            family = {"joined": "qwen2", "thinks_by_default": "exaone4"}[name]
            save_family(family, path, f"{name}.jinja")
        return load_processor(path)


def controls(tokenizer: Any, ids: list[int]) -> list[str]:
    """The added tokens among ``ids``, in order."""
    added = tokenizer.added_tokens_decoder
    return [added[index].content for index in ids if index in added]


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
