"""The language model of every family: one call with transformers' arguments; generation; saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from exafuse.generation.config import GenerationConfig
from exafuse.generation.generate import generate
from exafuse.kv_cache import KVCache
from exafuse.models.decoder import Decoder
from exafuse.models.losses import causal_lm_loss, check_kept
from exafuse.models.output import CausalLMOutput
from exafuse.models.placeholders import VisionInputs
from exafuse.weights.saving import write_json


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
            labels: int64 ``[batch, columns]``, -100 = ignored; shifted inside. The first token
                behind padding at the left would be predicted from padding: give it -100.
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
        vision = VisionInputs(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        embeds = self._embed(input_ids, inputs_embeds, output_attentions, vision)
        check_kept(logits_to_keep, labels, tuple(embeds.shape[:2]), self.config.vocab_size)
        body = self._body(
            embeds, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states
        )
        kept = body.hidden
        if isinstance(logits_to_keep, Tensor):
            kept = kept[:, logits_to_keep]
        elif logits_to_keep:
            kept = kept[:, -logits_to_keep:]
        logits = self.lm_head(kept)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutput(loss, logits, body.cache, body.hidden_states)
        return output if return_dict else output.to_tuple()

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see :func:`exafuse.generation.generate.generate` for every argument."""
        return generate(self, inputs, *args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and safetensors that transformers reads."""
        super().save_pretrained(folder)
        write_json(Path(folder) / "generation_config.json", self.generation_config.to_dict())
