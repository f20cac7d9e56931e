"""Which parts of a conversation spell an added token, and how they get through a chat template
without becoming one.

A tokenizer recognises its added tokens ("[|endofturn|]", "<|im_end|>", "<think>", ...) anywhere in
a text, also in the words of a user. Every such span is taken out of the conversation before
rendering and a private-use character, its *sentinel*, stands in its place; afterwards the sentinel
is replaced by the ids of the span encoded as ordinary text. Template and tokenizer never see it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from exafuse.errors import TemplateError

# Private-use characters of Unicode: the basic plane's first, then plane 15.
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
# What JSON must escape. A sentinel would hide these characters from the template's `tojson`.
_JSON_PLAIN_RE = re.compile(r'[^"\\\x00-\x1f]+')
# Keys that templates look up by name: never replaced, whatever tokens a vocabulary has.
_STRUCTURAL_KEYS = frozenset(
    {"role", "content", "type", "text", "name", "id", "function", "arguments", "parameters"}
    | {"tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning", "description"}
    | {"properties", "required", "items", "enum", "image", "video", "documents", "title"}
)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of messages or tools in which ``change`` was applied to every string but the roles and
    the structural keys. Objects that are neither text nor containers are passed through."""
    if isinstance(value, str):
        return change(str(value))
    if isinstance(value, Mapping):
        return {
            (key if not isinstance(key, str) or key in _STRUCTURAL_KEYS else change(key)): (
                item if key == "role" else map_strings(item, change)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def all_strings(value: Any) -> list[str]:
    """Every string that :func:`map_strings` would visit."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    map_strings(value, note)
    return found


@dataclass(frozen=True)
class Guard:
    """The added tokens of one tokenizer, and what it takes to find their spellings in a text.

    Whitespace-only tokens that are not special are left out: they are how a vocabulary spells blank
    space, not markers, and text that holds them must be encoded with them.
    """

    tokenizer: Any
    contents: tuple[str, ...]
    ids: frozenset[int]
    special_ids: frozenset[int]
    matches_normalized: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Guard:
        guarded = {
            index: token
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or not token.content.isspace())
        }
        normalizer = tokenizer.backend_tokenizer.normalizer
        return cls(
            tokenizer=tokenizer,
            contents=tuple(sorted({token.content for token in guarded.values()})),
            ids=frozenset(guarded),
            special_ids=frozenset(index for index, token in guarded.items() if token.special),
            matches_normalized=normalizer is not None
            and any(token.normalized for token in guarded.values()),
        )

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges of ``text`` that spell an added token, in order and disjoint: literally, or
        after the tokenizer's normalisation where a token is matched on normalised text."""
        found = [match.span() for match in _literal_re(self.contents).finditer(text)]
        if self.matches_normalized:
            todo = list(_gaps(found, 0, len(text)))
            while todo:  # what a match leaves over is cut off now, and may match in another way
                start, end = todo.pop()
                new = [(start + a, start + b) for a, b in self._matches(text[start:end])]
                found += new
                todo += _gaps(new, start, end) if new else []
        return sorted(found)

    def cuts(self, text: str, edges: list[int]) -> list[int]:
        """Those positions of the sorted ``edges`` where ``text`` must be cut, so that no added
        token that the tokenizer finds in it covers an edge."""
        found: list[int] = []
        todo = [(0, len(text))]
        while todo:
            start, end = todo.pop()
            new = []
            for a, b in self._matches(text[start:end]) if _any_within(edges, start, end) else []:
                if _any_within(edges, start + a, start + b):
                    new.append(edges[bisect_left(edges, start + a)])
            found += new
            todo += _gaps([(edge, edge + 1) for edge in new], start, end) if new else []
        return sorted(found)

    def encode_as_text(self, text: str, encode: Callable[[str, bool], list[int]]) -> list[int]:
        """The ids of ``text`` with no added token among them, by the tokenizer's
        ``encode(text, split_special_tokens)``.

        ``split_special_tokens`` reaches only the tokens flagged special; where another kind still
        matches, the text is cut behind the first character of the match.
        """
        cuts = {0, len(text)}
        todo = [(0, len(text))]
        while todo:
            start, end = todo.pop()
            matches = self._matches(text[start:end], split_special_tokens=True)
            if matches and end - start > 1:
                new = {start + a + 1 if start + a + 1 < end else start + a for a, _ in matches}
                cuts |= new
                todo += pairwise(sorted({start, end, *new}))
        ids: list[int] = []
        for start, end in pairwise(sorted(cuts)):
            piece = encode(text[start:end], True)
            # One character that the vocabulary cannot spell otherwise is an ordinary entry of it,
            # unless it is marked as special.
            forbidden = self.special_ids if end - start == 1 else self.ids
            if not forbidden.isdisjoint(piece):
                raise TemplateError(
                    f"the conversation contains {text[start:end]!r}, which this tokenizer can "
                    "encode only as a control token; remove it"
                )
            ids += piece
        return ids

    def _matches(self, text: str, split_special_tokens: bool = False) -> list[tuple[int, int]]:
        """The ranges that the tokenizer itself turns into added tokens."""
        if not text:
            return []
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        pairs = zip(ids, offsets, strict=True)
        return [(start, end) for index, (start, end) in pairs if index in self.ids and start < end]

    def may_join(self, text: str) -> bool:
        """Whether ``text`` begins or ends with a part of an added token, or is one: then a template
        that puts it beside another text may complete the token."""
        heads, tails, everything = _token_parts(self.contents)
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        forms = {text.strip()}
        if self.matches_normalized:
            forms.add(normalizer.normalize_str(text).strip())
        longest = max(map(len, self.contents), default=0)
        for form in forms - {""}:
            lengths = range(1, min(longest, len(form)) + 1)
            if form in everything or any(form[-k:] in heads or form[:k] in tails for k in lengths):
                return True
        return False


def _gaps(spans: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What the disjoint, ordered ``spans`` leave of the range from ``start`` to ``end``."""
    bounds = [start, *(bound for span in spans for bound in span), end]
    return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]


def _any_within(positions: list[int], start: int, end: int) -> bool:
    first = bisect_left(positions, start)
    return first < len(positions) and positions[first] < end


@lru_cache(maxsize=16)
def _literal_re(contents: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@lru_cache(maxsize=16)
def _token_parts(contents: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], str]:
    """All proper prefixes, all proper suffixes, and one text to search for infixes."""
    heads = frozenset(text[:k] for text in contents for k in range(1, len(text)))
    tails = frozenset(text[k:] for text in contents for k in range(1, len(text)))
    return heads, tails, "\0".join(contents)


@dataclass
class Sentinels:
    """Private-use characters that stand for pieces of text while a template renders.

    ``corpus``: everything that the template may write by itself or from the conversation; no
    sentinel occurs in it, neither as a character nor as its JSON escape.
    """

    corpus: str
    by_text: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def stand_in(self, text: str) -> str:
        """The sentinel of ``text``; the same one for the same text."""
        if text not in self.by_text:
            free = (chr(code) for code in _PRIVATE_USE if chr(code) not in self.texts)
            char = next((c for c in free if not any(s in self.corpus for s in _spellings(c))), None)
            if char is None:
                raise TemplateError(
                    "the conversation uses up all private-use characters of Unicode; remove some"
                )
            self.by_text[text] = char
            self.texts[char] = text
        return self.by_text[text]

    def hide(self, text: str, spans: list[tuple[int, int]]) -> str:
        """``text`` with a sentinel in the place of each span."""
        pieces, end = [], 0
        for start, stop in spans:
            span = text[start:stop]
            hidden, changes = _JSON_PLAIN_RE.subn(lambda m: self.stand_in(m.group()), span)
            pieces += [text[end:start], hidden if changes else self.stand_in(span)]
            end = stop
        return "".join([*pieces, text[end:]])

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """``rendered`` as (text, is a hidden span) pieces; adjacent spans are one piece.

        A template's `tojson` may have escaped the sentinels: those are found too.
        """
        if not self.texts:
            return [(rendered, False)] if rendered else []
        spellings = {s: text for char, text in self.texts.items() for s in _spellings(char)}
        pattern = "|".join(re.escape(spelling) for spelling in spellings)
        pieces: list[tuple[str, bool]] = []
        for position, piece in enumerate(re.split(f"((?:{pattern})+)", rendered)):
            if not piece:
                continue
            if position % 2 == 0:
                pieces.append((piece, False))
            else:
                text = re.sub(pattern, lambda match: spellings[match.group()], piece)
                pieces.append((text, True))
        return pieces


def _spellings(char: str) -> tuple[str, str]:
    return char, json.dumps(char)[1:-1]
