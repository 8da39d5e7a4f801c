"""What is measured of a model while it trains: held-out bits per byte, and samples to look at."""

import torch
from transformers import GenerationConfig

from corpus import held_out_batches
from reporting import bits_per_byte


@torch.no_grad()
def held_out_bits_per_byte(accelerator, model, tokens, recipe):
    """Bits per byte of held-out text in windows of `sequence_length`, each target scored once.

    The cost of the boundaries is included although they are no bytes of the text, so a comparison
    with a compressor errs to the model's disadvantage. So do the windows: each begins afresh.
    """
    model = accelerator.unwrap_model(model)
    model.eval()
    nats = torch.zeros((), device=accelerator.device)
    batches = held_out_batches(
        tokens,
        recipe.sequence_length,
        recipe.eval_batch_size,
        recipe.packing,
        accelerator.process_index,
        accelerator.num_processes,
    )
    for batch in batches:
        batch = {key: tensor.to(accelerator.device) for key, tensor in batch.items()}
        # Divided by one item, the mean loss is a sum.
        labels = {"labels": batch["shift_labels"], "num_items_in_batch": 1}
        nats += model(**batch, **labels, use_cache=False).loss
    model.train()
    return bits_per_byte(accelerator.reduce(nats, "sum").item(), tokens.num_bytes)


@torch.no_grad()
def diagnostics(accelerator, model, tokens=None, recipe=None):
    """What an architecture wants watched (its `diagnostics`), by name; {} if there is nothing.

    Args:
        accelerator: of the run.
        model: the language model.
        tokens: held-out text, whose first window fills the state; None: no state.
        recipe: of the run.
    """
    model = accelerator.unwrap_model(model)
    if not hasattr(model, "diagnostics"):
        return {}
    if tokens is None:
        return model.diagnostics()
    model.eval()
    batch = next(iter(held_out_batches(tokens, recipe.sequence_length, 1, recipe.packing, 0, 1)))
    inputs = {key: x.to(accelerator.device) for key, x in batch.items() if key != "shift_labels"}
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    model.train()
    return model.diagnostics(cache)


@torch.no_grad()
def sample(accelerator, model, tokenizer, prompt, num_tokens, seed):
    """A prompt as the start of a document, and its continuation at temperature 0.8."""
    model = accelerator.unwrap_model(model)
    model.eval()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[tokenizer.eos_token_id, *ids]], device=accelerator.device)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():  # training continues with the numbers it would have drawn
        torch.manual_seed(seed)
        mask = torch.ones_like(inputs)
        output = model.generate(inputs, attention_mask=mask, generation_config=settings)
    model.train()
    return tokenizer.decode(output[0], skip_special_tokens=True)
