"""Heads that classify: a text, each of its tokens, or where in it an answer begins and ends.

The decoder and a linear layer, with transformers' own losses. A token is judged by what comes
before it, as everywhere in a decoder. Padding may be anywhere in a row, and changes nothing: no
text ends in it, and no answer lies in it. transformers' own generic heads ask AutoModel for the
decoder, which exported code cannot, and find a text's end by the padding's token id alone.
"""

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .base import ZooModel, ZooPreTrainedModel
from .parallel import refuse_slices
from .state import CACHE

ONE_PROCESS = "set it to None, and replay_segment_length or gradient checkpointing against memory"


def _at_least_float32(logits):
    """Logits as losses want them: float16 and bfloat16 have too few digits for their sums."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ZooForSequenceClassification(ZooPreTrainedModel):
    """The decoder with a classifier on each row's last token."""

    model_class: type[ZooModel]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """One row of logits per text and, with labels, their loss.

        Args, beside those of `ZooModel.forward`:
            labels: [B] classes, -100 is not scored; or [B] numbers if num_labels is 1; or
                [B, num_labels] of 0.0 and 1.0, of which several may hold. config.problem_type says
                which, and if it is None, the first labels decide.
            num_items_in_batch: what the summed loss is divided by; None: scored labels here.

        Returns:
            loss (scalar), logits [B, num_labels], past_key_values.

        Raises:
            ValueError: several rows, and neither attention_mask nor config.pad_token_id to say
                where they end; sequence_parallel.
        """
        refuse_slices(self.model, "a text is classified by its last token", ONE_PROCESS)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = output.last_hidden_state
        last_B = self._last_tokens(hidden_BTD, input_ids, attention_mask)
        rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        logits = self.score(hidden_BTD[rows_B, last_B])
        loss = None
        if labels is not None:
            loss = self._loss(_at_least_float32(logits), labels, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(output, CACHE)},
            hidden_states=output.hidden_states,
        )

    def _last_tokens(self, hidden_BTD, input_ids, attention_mask):
        """The column of each row's last token, [B]."""
        batch, time = hidden_BTD.shape[:2]
        padding = self.config.pad_token_id
        if attention_mask is not None:
            is_token_BT = attention_mask[:, -time:] != 0
        elif input_ids is not None and padding is not None:
            is_token_BT = input_ids != padding
        elif batch == 1:
            return torch.full((1,), time - 1, device=hidden_BTD.device)
        else:
            raise ValueError(
                f"{type(self).__name__}: expected attention_mask, or input_ids and "
                f"config.pad_token_id, to know where each of {batch} rows ends, got neither; pass "
                "attention_mask."
            )
        columns_T = torch.arange(time, device=hidden_BTD.device)
        return torch.where(is_token_BT.to(hidden_BTD.device), columns_T, 0).amax(1)

    def _loss(self, logits, labels, num_items_in_batch):
        is_of_classes = self.config.problem_type == "single_label_classification" or (
            self.config.problem_type is None
            and self.num_labels > 1
            and not labels.is_floating_point()
        )
        arguments = {"logits": logits, "pooled_logits": logits, "config": self.config}
        if is_of_classes:
            return self.loss_function(
                labels=labels, num_items_in_batch=num_items_in_batch, **arguments
            )
        # Numbers, which a data set may hold as integers. transformers leaves num_items_in_batch out
        # for these losses, and a Trainer that accumulates gradients counts on it.
        loss = self.loss_function(labels=labels.to(logits.dtype), **arguments)
        if num_items_in_batch is None:
            return loss
        return loss * labels.numel() / num_items_in_batch


class ZooForTokenClassification(ZooPreTrainedModel):
    """The decoder with a classifier on each token."""

    model_class: type[ZooModel]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """One row of logits per token and, with labels, their cross entropy.

        Args, beside those of `ZooModel.forward`:
            labels: [B, T] classes; -100, as on padding, is not scored.
            use_cache: None: only if past_key_values is given, which then holds the state after
                these tokens.
            num_items_in_batch: what the summed loss is divided by; None: scored labels here.

        Returns:
            loss (scalar, nats per scored token), logits [B, T, num_labels].
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        logits = self.score(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config, num_items_in_batch=num_items_in_batch
            )
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


class ZooForQuestionAnswering(ZooPreTrainedModel):
    """The decoder with two scores on each token: an answer begins here, it ends here."""

    model_class: type[ZooModel]

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Two scores per token and, with both positions, the mean of their cross entropies.

        Args, beside those of `ZooModel.forward`:
            start_positions: [B], the column of each answer's first token. One below 0 (-100) or
                from T on, an answer that was cut off, is not scored.
            end_positions: [B], of its last token.
            num_items_in_batch: what the summed loss is divided by; None: scored rows here.

        Returns:
            loss (scalar), start_logits and end_logits [B, T], the least possible on padding.

        Raises:
            ValueError: positions with sequence_parallel.
        """
        if start_positions is not None or end_positions is not None:
            refuse_slices(self.model, "an answer is one of all tokens of a row", ONE_PROCESS)
        # Nothing in the output would hold a state; past_key_values, if given, holds that after.
        kwargs["use_cache"] = bool(kwargs.get("use_cache"))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits_BT2 = self.qa_outputs(output.last_hidden_state)
        if attention_mask is not None:
            is_padding_BT = attention_mask[:, -logits_BT2.shape[1] :] == 0
            least = torch.finfo(logits_BT2.dtype).min
            logits_BT2 = logits_BT2.masked_fill(
                is_padding_BT.to(logits_BT2.device)[..., None], least
            )
        start_logits, end_logits = (x.contiguous() for x in logits_BT2.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                _at_least_float32(start_logits),
                _at_least_float32(end_logits),
                self._scored(start_positions, logits_BT2),
                self._scored(end_positions, logits_BT2),
                num_items_in_batch=num_items_in_batch,
            )
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=output.hidden_states,
        )

    @staticmethod
    def _scored(positions, logits_BT2):
        """Positions [B], those below 0 moved to T, which the loss leaves out: it has 0 for them."""
        positions_B = positions.reshape(-1).to(logits_BT2.device)
        return torch.where(positions_B < 0, logits_BT2.shape[1], positions_B)


__all__ = [
    "ZooForQuestionAnswering",
    "ZooForSequenceClassification",
    "ZooForTokenClassification",
]
