"""The heads beside that of a language model, over the same body; semantics of transformers 5.23."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from exafuse.config import ModelConfig
from exafuse.kv_cache import KVCache
from exafuse.models.backbone import Backbone
from exafuse.models.losses import (
    check_class_ids,
    check_sequence_labels,
    check_span,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
)
from exafuse.models.output import (
    BaseModelOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from exafuse.models.placeholders import VisionInputs


class BaseModel(Backbone):
    """The body alone: hidden states after the final norm."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Arguments as for :meth:`exafuse.models.causal_lm.CausalLM.forward`."""
        vision = VisionInputs(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        embeds = self._embed(input_ids, inputs_embeds, output_attentions, vision)
        body = self._body(
            embeds, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states
        )
        output = BaseModelOutput(body.hidden, body.cache, body.hidden_states)
        return output if return_dict else output.to_tuple()


class SequenceClassifier(Backbone):
    """Scores of whole sequences, read off the last token of each."""

    def __init__(self, config: ModelConfig, backend: ModuleType) -> None:
        super().__init__(config, backend)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """``logits [batch, num_labels]``; other arguments as for a language model.

        A row's last token is the rightmost one whose id is not ``config.pad_token_id``: padding may
        be at either side. Without a pad id there can be one row only, and with ``inputs_embeds``
        ids are not known: then it is the last column.

        Args:
            labels: int64 ``[batch]`` ids of classes (-100 = ignored), floats ``[batch]`` for a
                single label (squared error), or floats ``[batch, num_labels]`` for a yes or no to
                each. ``config.problem_type`` decides where it is set.

        Raises:
            ValueError: more rows than one without a pad id; the attention mask hides the last token
                of a row; labels of another shape, dtype or range.
        """
        embeds = self._embed(input_ids, inputs_embeds, output_attentions)
        last = self._last_tokens(input_ids, embeds, attention_mask)
        if labels is not None:
            check_sequence_labels(labels, self.config.head, embeds.shape[0])
        body = self._body(
            embeds, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states
        )
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(body.hidden[rows, last])
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(logits, labels, self.config.head)
        output = SequenceClassifierOutput(loss, logits, body.cache, body.hidden_states)
        return output if return_dict else output.to_tuple()

    def _last_tokens(
        self, input_ids: Tensor | None, embeds: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """int64 ``[batch]``, the column of each row's last token."""
        batch, columns = embeds.shape[:2]
        pad = self.config.pad_token_id
        if pad is None and batch > 1:
            raise ValueError(
                f"pad_token_id: expected the id that pads rows, the config has none and the batch "
                f"{batch} rows; set it in config.json, or with model.config = "
                "dataclasses.replace(model.config, pad_token_id=...)"
            )
        if pad is None or input_ids is None:
            if pad is not None:
                warnings.warn(
                    "inputs_embeds: padding cannot be told from tokens, the last column of every "
                    "row is classified",
                    stacklevel=5,
                )
            last = torch.full((batch,), columns - 1, device=self.device)
        else:
            cells = torch.arange(columns, device=input_ids.device) * (input_ids != pad)
            last = cells.argmax(-1).to(self.device)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            here = attention_mask[:, -columns:].to(self.device)
            if here.shape == (batch, columns):
                hidden = here.gather(1, last[:, None]).eq(0) & here.ne(0).any(1, keepdim=True)
                if bool(hidden.any()):
                    row = int(hidden.int().argmax())
                    raise ValueError(
                        f"attention_mask: row {row}'s last token that is not pad_token_id ({pad}) "
                        f"is column {int(last[row])}, which the mask calls padding; set "
                        "pad_token_id to the id that the tokenizer pads with"
                    )
        return last


class TokenClassifier(Backbone):
    """Scores of every token."""

    def __init__(self, config: ModelConfig, backend: ModuleType) -> None:
        super().__init__(config, backend)
        self.dropout = nn.Dropout(config.head.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.head.bias)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """``logits [batch, columns, num_labels]``; other arguments as for a language model.

        Args:
            past_key_values: a cache to go on with; no new one is made, whatever ``use_cache`` says,
                for the output has no place for it.
            labels: int64 ``[batch, columns]`` ids of classes, -100 = ignored; not shifted.

        Raises:
            ValueError: labels of another shape, dtype or range.
        """
        embeds = self._embed(input_ids, inputs_embeds, output_attentions)
        if labels is not None:
            check_class_ids("labels", labels, tuple(embeds.shape[:2]), self.config.num_labels)
        body = self._body(
            embeds, attention_mask, position_ids, past_key_values, False, output_hidden_states
        )
        logits = self.score(self.dropout(body.hidden))
        loss = None if labels is None else token_classification_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, body.hidden_states)
        return output if return_dict else output.to_tuple()


class QuestionAnswerer(Backbone):
    """Scores of every token to begin and to end the answer."""

    def __init__(self, config: ModelConfig, backend: ModuleType) -> None:
        super().__init__(config, backend)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        num_items_in_batch: int | Tensor | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """``start_logits, end_logits [batch, columns]``; other arguments as for a language model.

        Args:
            past_key_values: a cache to go on with; no new one is made, whatever ``use_cache`` says,
                for the output has no place for it.
            start_positions, end_positions: int64 ``[batch]`` columns of the answer's first and last
                token; beyond the columns = ignored. The loss needs both.
            num_items_in_batch: divides the summed loss in place of the number of rows.

        Raises:
            ValueError: positions of another shape or dtype.
        """
        embeds = self._embed(input_ids, inputs_embeds, output_attentions)
        for name, positions in (
            ("start_positions", start_positions),
            ("end_positions", end_positions),
        ):
            if positions is not None:
                check_span(name, positions, embeds.shape[0])
        body = self._body(
            embeds, attention_mask, position_ids, past_key_values, False, output_hidden_states
        )
        start, end = self.qa_outputs(body.hidden).unbind(-1)
        start, end = start.contiguous(), end.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(
                start, end, start_positions, end_positions, num_items_in_batch
            )
        output = QuestionAnsweringOutput(loss, start, end, body.hidden_states)
        return output if return_dict else output.to_tuple()
