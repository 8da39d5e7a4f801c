"""A language model's loss where landmarks are targets too: of the last token of each block."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..core.base import LOSS_IGNORES, ZooForCausalLM
from ..core.state import CACHE


@dataclass
class OutputWithOwnStates(BaseModelOutputWithPast):
    """What the decoder returns where landmarks predict, if it is asked to.

    Attributes:
        own_states: the states of all tokens themselves, [B, T, D].
        ends_block: bool, which tokens have their landmark behind them, [B, T, 1].
    """

    own_states: torch.FloatTensor | None = None
    ends_block: torch.BoolTensor | None = None


class ForCausalLMWithLandmarks(ZooForCausalLM):
    """A language model whose decoder puts landmarks in.

    Attributes:
        include_landmark_in_loss: where landmarks predict (`landmark_predicts_next`), whether the
            loss has them as targets too: of the last token of each block whose next one is scored.
            Both kinds of targets are one mean. How to train, as the authors do for LLaMA, not part
            of the model: set it on the instance.
    """

    include_landmark_in_loss: bool = False

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
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: DynamicCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As of `ZooForCausalLM`, the loss with landmarks as targets if that was asked for.

        Raises:
            ValueError: it was, and landmarks do not predict, or the loss is one of the other kinds.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "cache": cache,
            "return_dict": True,
            **kwargs,
        }
        shift_labels = inputs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if not (self.include_landmark_in_loss and has_labels):
            loss = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            if shift_labels is not None:
                loss["shift_labels"] = shift_labels
            return super().forward(**inputs, **loss, logits_to_keep=logits_to_keep)
        self._check_landmarks_as_targets()
        output = self.model(**inputs, returns_own_states=True)
        logits = self.lm_head(output.last_hidden_state)
        if shift_labels is None:
            shift_labels = pad(labels[:, 1:], (0, 1), value=LOSS_IGNORES)
        targets = shift_labels.to(logits.device)
        is_target = output.ends_block[..., 0] & (targets != LOSS_IGNORES)
        landmarks = torch.full_like(targets[is_target], self.config.landmark_token_id)
        own_logits = self.lm_head(output.own_states[is_target])
        targets = torch.cat([targets.flatten(), landmarks])
        all_logits = torch.cat([logits.flatten(0, 1), own_logits])
        loss = self.loss_function(
            logits=all_logits[None],
            labels=None,
            vocab_size=self.config.vocab_size,
            shift_labels=targets[None],
            num_items_in_batch=num_items_in_batch,
        )
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[:, logits_to_keep],
            **{CACHE: getattr(output, CACHE)},
            hidden_states=output.hidden_states,
        )

    def _check_landmarks_as_targets(self):
        if not self.config.landmark_predicts_next:
            raise ValueError(
                "include_landmark_in_loss has the last token of a block predict its landmark, and "
                "that the next token: it needs landmark_predicts_next = True in the config, got "
                "False."
            )
        if self.loss_chunk_size is not None or self.z_loss or self.model.replay_segment_length:
            raise ValueError(
                "include_landmark_in_loss needs all logits at once and no z-loss, got "
                f"loss_chunk_size = {self.loss_chunk_size}, z_loss = {self.z_loss} and "
                f"replay_segment_length = {self.model.replay_segment_length}; set these to None, 0 "
                "and None."
            )
