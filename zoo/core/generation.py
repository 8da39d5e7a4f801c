"""`generate` on a recurrent state: what transformers' loop does not know of one.

A cache of keys can hide a column afterwards; a state that has taken a token in cannot give it back.
So rows that have ended are not run on, and what only a cache of keys can do is refused.
"""

from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .parallel import refuse_slices
from .state import CACHE_NAMES, one_cache


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows have ended.

    Attributes:
        before_last: [B] bool, the rows that ended before their last token; None: there is none yet.
    """

    def __init__(self, criteria):
        super().__init__(criteria)
        self.before_last = self._now = None

    def __call__(self, input_ids, scores, **kwargs):
        """Which rows end with their last token, [B] bool."""
        ends = super().__call__(input_ids, scores, **kwargs)
        self.before_last = self._now
        self._now = ends if self._now is None else self._now | ends
        return ends


class StateGeneration(GenerationMixin):
    """transformers' generation for models with a recurrent state."""

    def _sample(self, input_ids, logits_processor, stopping_criteria, *args, **kwargs):
        # As the loop asks: without an end of text, rows that have ended get tokens as before.
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if len(input_ids) > 1 and has_end:
            stopping_criteria = kwargs["ended_rows"] = EndedRows(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, *args, **kwargs)

    # transformers reads these names to know what the model can be given.
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        ended_rows=None,
        cache=None,
        **kwargs,
    ):
        """As in transformers; a row that has ended gets padding, which leaves its state as it was.

        Its state is then that after its last token, and a second turn whose attention mask hides
        the padding goes on from there.
        """
        refuse_slices(
            self.base_model,
            "generate goes on from the end of rows",
            "run the prompt over slices with use_cache=True, then set it to None and generate from "
            "that cache on the last process",
        )
        cache = one_cache(past_key_values, cache)
        ended_B = None if ended_rows is None else ended_rows.before_last
        if ended_B is not None and cache is not None:
            if attention_mask is None:
                attention_mask = input_ids.new_ones(len(input_ids), 1)
            # In place: the loop appends to this tensor, and knows nothing of rows that have ended.
            attention_mask[:, -1] = ~ended_B.to(attention_mask.device)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            cache,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        position_ids = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        cache = one_cache(*(model_kwargs.get(name) for name in CACHE_NAMES))
        first = (getattr(cache, "layers", None) or [None])[0]
        shift_B = getattr(first, "position_shift", None)
        if shift_B is None:
            return position_ids
        # Of a joined state: on from there, as columns count from there.
        next_B = (first.clock + shift_B).to(position_ids.device)
        # Rows may have been repeated for beams by now, each so many times.
        next_B = next_B[:: max(1, len(next_B) // inputs_tensor.shape[0])]
        before_B1, mask = first.length, model_kwargs.get("attention_mask")
        if mask is not None:
            before_B1 = mask[:, :before_B1].sum(1, keepdim=True).to(position_ids.device)
        return position_ids - before_B1 + next_B[:, None]

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit drafts with the first layers alone, whose states would have "
                f"to be kept apart, got {generation_config.assistant_early_exit}; draft with a "
                "smaller assistant_model, or with prompt_lookup_num_tokens."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch`, which begins here.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch) keeps its cache in pages of keys and values, "
            f"which the recurrent state of {type(self).__name__} has not; use generate with a "
            "padded batch."
        )
