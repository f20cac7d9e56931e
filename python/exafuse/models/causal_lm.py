"""The language model of every family: one call with transformers' arguments; generation; saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exafuse.batch import Packing, check_ids, padding_mask
from exafuse.generation.config import GenerationConfig
from exafuse.generation.generate import generate
from exafuse.kv_cache import KVCache
from exafuse.layers import Step
from exafuse.models.decoder import Decoder
from exafuse.models.output import CausalLMOutput, causal_lm_loss, check_kept
from exafuse.models.placeholders import VisionInputs
from exafuse.rotary import RotaryState
from exafuse.weights.saving import save_weights


class CausalLM(Decoder):
    """A Llama, Qwen2 or EXAONE 4 language model; made by ``from_pretrained`` or
    ``from_config``."""

    generation_config: GenerationConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of a padded batch, with transformers' arguments and output fields.

        Args:
            input_ids: int64 ``[batch, columns]``; or ``inputs_embeds [batch, columns,
                hidden_size]``.
            attention_mask: ``[batch, columns]`` or with the cached columns in front; 0 = padding,
                at the left or the right of a row. Padding costs nothing, its outputs are 0.
            position_ids: ``[batch or 1, columns]`` RoPE positions; default: where each row
                stopped (a new row: 0) + 0, 1, 2, ... over the columns. Padding behind a row's
                tokens does not exist for later calls, neither for positions nor for windows.
                Masks and windows never read positions. Without a cache and a mask, a jump
                starts a new packed sequence.
            past_key_values: a cache returned by an earlier call; advanced in place.
            labels: int64 ``[batch, columns]``, -100 = ignored; shifted inside.
            use_cache: return a cache. None = the config's wish, unless a gradient is needed.
            logits_to_keep: last n columns (0 = all), or a 1-D tensor of columns.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: attention weights are never formed; True is a ValueError.
            return_dict: False returns the plain tuple of the fields that are set.
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: images and videos
                whose placeholders are in the input, as for ``get_image_features``; a ValueError in
                a model without a vision tower. Placeholder ids without them are ordinary tokens.
            num_items_in_batch: divides the summed loss in place of the number of labels.

        Returns:
            :class:`CausalLMOutput`.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions: attention weights are never formed, expected False"
            )
        embeds, batch, columns = self._embed(input_ids, inputs_embeds)
        vision = VisionInputs(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        places = self._placeholders(input_ids, embeds, vision)
        if places is not None:
            embeds = places.fill(embeds, places.index)
        check_kept(logits_to_keep, labels, batch, columns)
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
        kept = hidden
        if isinstance(logits_to_keep, Tensor):
            kept = hidden[:, logits_to_keep]
        elif logits_to_keep:
            kept = hidden[:, -logits_to_keep:]
        logits = self.lm_head(kept)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutput(loss, logits, cache, None if collect is None else tuple(collect))
        return output if return_dict else output.to_tuple()

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, int, int]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if inputs_embeds is not None:
            shape = tuple(inputs_embeds.shape)
            if len(shape) != 3 or shape[2] != self.config.hidden_size or 0 in shape:
                raise ValueError(
                    f"inputs_embeds: expected (batch, columns >= 1, {self.config.hidden_size}), "
                    f"got {shape}"
                )
            return inputs_embeds.to(self.dtype), shape[0], shape[1]
        assert input_ids is not None
        check_ids(input_ids, self.config.vocab_size)
        return self.text.embed_tokens(input_ids), input_ids.shape[0], input_ids.shape[1]

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

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see :func:`exafuse.generation.generate.generate` for every argument."""
        return generate(self, inputs, *args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and safetensors that transformers reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", self.config.to_dict())
        _write_json(folder / "generation_config.json", self.generation_config.to_dict())
        save_weights(self, folder)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
