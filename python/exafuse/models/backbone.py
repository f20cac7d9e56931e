"""What the models of every head share: the trunk and a call of it on padded input."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exafuse.batch import Packing, check_ids, padding_mask
from exafuse.config import ModelConfig
from exafuse.kv_cache import KVCache
from exafuse.layers import Step, resolve_backend
from exafuse.models.output import BodyOutput
from exafuse.models.placeholders import Placeholders, VisionInputs
from exafuse.models.stepping import next_step
from exafuse.models.text_model import TextModel
from exafuse.rotary import RotaryState, RotaryTable
from exafuse.weights.quantising import check_unquantised
from exafuse.weights.saving import save_weights, write_json

PREFILL_CHUNK = 2048


class Backbone(nn.Module):
    """A trunk, to which subclasses add a head; padded input in, hidden states out."""

    has_vision = False
    trunk: ClassVar[type[TextModel] | type[nn.Module]] = TextModel

    def __init__(self, config: ModelConfig, backend: ModuleType) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.model = type(self).trunk(config)
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_position_embeddings)
        self.prefill_chunk = PREFILL_CHUNK
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A module cannot be pickled or deep-copied; its path says how to find it again.
        return self.__dict__ | {"backend": getattr(self.backend, "path", "reference")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.backend = resolve_backend(state["backend"])

    @property
    def text(self) -> TextModel:
        """The language model's embedding, layers and final norm."""
        assert isinstance(self.model, TextModel)
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of token ids."""
        return self.text.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of every hidden state."""
        return self.text.embed_tokens.weight.dtype

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for ``batch_size`` rows that grows when needed.

        Args:
            batch_size: number of rows.
            max_length: tokens a row will reach, when known; reserved at once, so nothing grows
                later.
        """
        return KVCache(
            self.config,
            batch_size,
            dtype=self.dtype,
            device=self.device,
            max_length=max_length,
            chunk=self.prefill_chunk,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Only a language model can: see :class:`exafuse.models.causal_lm.CausalLM`."""
        raise ValueError(
            f"generate: expected a language model, got {self.config.head.describe()}; "
            'load the checkpoint with head="causal_lm"'
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and safetensors that transformers reads. A quantised model is a
        ValueError."""
        check_unquantised(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.config.to_dict())
        save_weights(self, folder)

    def _body(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: KVCache | None,
        use_cache: bool | None,
        output_hidden_states: bool,
    ) -> BodyOutput:
        """Run the body on ``embeds [batch, columns, hidden_size]`` from :meth:`_embed`; arguments
        as for the call of a model."""
        batch, columns = embeds.shape[:2]
        wants_grad = torch.is_grad_enabled() and (
            embeds.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not wants_grad
        if cache is None and use_cache:
            cache = self.new_cache(batch)
        if cache is not None:
            self._check_cache(cache, batch)
        seen = 0 if cache is None else cache.seen
        mask = None
        if attention_mask is not None:
            cached = [0] * batch if cache is None else cache.lengths
            mask = padding_mask(attention_mask, batch, columns, cached, seen)
        positions, num_positions = self._positions(position_ids, batch, columns, cache)
        if self.training and self.config.attention_dropout:
            raise ValueError("attention_dropout: not implemented, expected 0 in training")
        collect: list[Tensor] | None = [] if output_hidden_states else None
        if cache is None:
            packed = position_ids is not None and attention_mask is None
            hidden = self._whole(embeds, mask, positions, num_positions, packed, collect)
        else:
            with cache.transaction():
                hidden = self._chunks(embeds, mask, positions, num_positions, cache, collect)
        return BodyOutput(hidden, cache, None if collect is None else tuple(collect))

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_attentions: bool,
        vision: VisionInputs | None = None,
    ) -> Tensor:
        """What enters the first layer, ``[batch, columns, hidden_size]``; raises for what a call
        cannot honour."""
        if output_attentions:
            raise ValueError(
                "output_attentions: attention weights are never formed, expected False"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if inputs_embeds is not None:
            shape = tuple(inputs_embeds.shape)
            if len(shape) != 3 or shape[2] != self.config.hidden_size or 0 in shape:
                raise ValueError(
                    f"inputs_embeds: expected (batch, columns >= 1, {self.config.hidden_size}), "
                    f"got {shape}"
                )
            embeds = inputs_embeds.to(self.dtype)
        else:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            embeds = self.text.embed_tokens(input_ids)
        places = self._placeholders(input_ids, embeds, vision or VisionInputs())
        return embeds if places is None else places.fill(embeds, places.index)

    def _placeholders(
        self, input_ids: Tensor | None, embeds: Tensor | None, vision: VisionInputs
    ) -> Placeholders | None:
        """Features of images and videos, and their places in the ids or, without these, in
        ``embeds``; None without images and videos."""
        if given := vision.given():
            raise ValueError(f"{', '.join(given)}: expected None, this model has no vision tower")
        return None

    def _positions(
        self, position_ids: Tensor | None, batch: int, columns: int, cache: KVCache | None
    ) -> tuple[Tensor, int]:
        """RoPE positions ``[batch, columns]`` and one more than the largest."""
        if position_ids is None:
            positions = torch.arange(columns, device=self.device).expand(batch, columns)
            if cache is None:
                return positions, columns
            return positions + cache.next_positions[:, None], cache.num_positions + columns
        if position_ids.shape not in ((batch, columns), (1, columns), (columns,)):
            raise ValueError(
                f"position_ids: expected ({batch}, {columns}), got {tuple(position_ids.shape)}"
            )
        positions = position_ids.to(self.device).expand(batch, columns)
        if int(positions.min()) < 0:
            raise ValueError("position_ids: expected non-negative positions")
        largest = int(positions.max())
        if largest >= 2**31 - 1:
            raise ValueError(f"position_ids: expected positions below 2**31 - 1, got {largest}")
        return positions, largest + 1

    def _check_cache(self, cache: KVCache, batch: int) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(
                "past_key_values: expected the KVCache that an earlier call returned, "
                f"got {type(cache).__name__}"
            )
        if cache.batch_size != batch:
            raise ValueError(
                f"past_key_values: holds {cache.batch_size} rows, the input has {batch}"
            )

    def _chunks(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        num_positions: int,
        cache: KVCache,
        collect: list[Tensor] | None,
    ) -> Tensor:
        """Padded hidden states of a call with a cache, at most ``cache.chunk`` columns at a
        time."""
        cache.num_positions = max(cache.num_positions, num_positions)
        cos, sin = self.rotary(num_positions, self.device, cache.rotary_state)
        columns = embeds.shape[1]
        outputs: list[Tensor] = []
        collected: list[list[Tensor]] = []
        for start in range(0, columns, cache.chunk):
            span = slice(start, min(start + cache.chunk, columns))
            part = None if mask is None else mask[:, span]
            packing = Packing.of(embeds.shape[0], span.stop - start, part, self.device)
            here: list[Tensor] | None = None if collect is None else []
            x = self._run(
                packing.pack(embeds[:, span]),
                packing,
                cache,
                cos,
                sin,
                packing.pack(positions[:, span]),
                here,
            )
            outputs.append(packing.pad(x))
            if here is not None:
                collected.append([packing.pad(h) for h in here])
        if collect is not None:
            collect += [torch.cat(parts, 1) for parts in zip(*collected, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _whole(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        num_positions: int,
        packed: bool,
        collect: list[Tensor] | None,
    ) -> Tensor:
        """Padded hidden states of a call without a cache; differentiable.

        ``packed``: a jump of the positions starts a new sequence.
        """
        batch, columns = embeds.shape[:2]
        packing = Packing.of(batch, columns, mask, self.device)
        cu_seqlens = packing.cu_seqlens(self.device)
        max_seqlen = max(packing.lengths)
        if packed:
            jump = positions.diff(dim=1, prepend=positions[:, :1] - 2) != 1
            starts = jump.flatten().nonzero().squeeze(1)
            cu_seqlens = F.pad(starts, (0, 1), value=batch * columns).to(torch.int32)
            max_seqlen = int(cu_seqlens.diff().max())
        cos, sin = self.rotary(num_positions, self.device, RotaryState())
        step = Step(
            cos, sin, packing.pack(positions).to(torch.int32), cu_seqlens, max_seqlen, None, {}
        )
        x = self.text(packing.pack(embeds), step, self.backend, collect)
        if collect is not None:
            collect[:] = [packing.pad(h) for h in collect]
        return packing.pad(x)

    def _run(
        self,
        embeds: Tensor,
        packing: Packing,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """One chunk of packed tokens through the layers, written to the cache.

        ``positions`` for RoPE; None = each row goes on where it stopped, counting real tokens.
        """
        if embeds.shape[0] == 0:  # padding in every row
            cache.advance(packing.lengths, packing.columns, packing.mask)
            if collect is not None:
                collect += [embeds] * (self.config.num_layers + 1)
            return embeds
        step = next_step(cache, packing, cos, sin, positions)
        hidden: Tensor = self.text(embeds, step, self.backend, collect)
        return hidden
