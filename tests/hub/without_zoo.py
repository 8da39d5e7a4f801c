"""Uses an exported folder as somebody without the zoo does. Run by test_export.py.

    python without_zoo.py EXPORTED TIED_EXPORTED REFERENCE WORK

Each check below returns what JSON can hold; the results go to standard output, by name.
"""

import json
import os
import re
import sys
import traceback
from pathlib import Path

# Neither the zoo nor anything it could use is there.
assert "zoo" not in sys.modules
for name in ("zoo", "kernels", "triton", "fla"):
    sys.modules[name] = None

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

EXPORTED, TIED, REFERENCE, WORK = map(Path, sys.argv[1:])
REMOTE = {"trust_remote_code": True}
reference = load_file(REFERENCE)
ids, mask = reference["input_ids"], reference["attention_mask"]


def load(auto=AutoModelForCausalLM, folder=EXPORTED, **options):
    return auto.from_pretrained(folder, **REMOTE, **options).eval()


@torch.no_grad()
def logits_of(model, **inputs):
    return model(**(inputs or {"input_ids": ids, "attention_mask": mask})).logits


def config_and_model_are_of_one_module():
    config = AutoConfig.from_pretrained(EXPORTED, **REMOTE)
    model = load()
    assert type(config) is type(model.config) is type(model).config_class
    return type(config).__module__.split(".")[0]


def logits():
    return torch.equal(logits_of(load()), reference["logits"])


def logits_by_its_name_on_the_hub():
    # Unlike a folder's, transformers looks into every file for libraries that must be there.
    model = AutoModelForCausalLM.from_pretrained("owner/tiny", **REMOTE).eval()
    return torch.equal(logits_of(model), reference["logits"])


def hidden_states():
    output = load(AutoModel)(ids, attention_mask=mask)
    return torch.equal(output.last_hidden_state, reference["last_hidden_state"])


def greedy():
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    new = load().generate(ids, attention_mask=mask, **options)
    return torch.equal(new, reference["greedy"])


def beams():
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    new = load().generate(ids, attention_mask=mask, **options)
    return torch.equal(new, reference["beams"])


def tokenizer():
    return AutoTokenizer.from_pretrained(EXPORTED)("Hi")["input_ids"]


def text_generation_pipeline():
    pipe = pipeline("text-generation", model=str(EXPORTED), **REMOTE)
    texts = pipe(["def f(", "x"], max_new_tokens=5, batch_size=2)
    return [text[0]["generated_text"] for text in texts]


def sequence_classification():
    model = load(AutoModelForSequenceClassification, num_labels=3)
    model.config.pad_token_id = 256
    output = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    output.loss.backward()
    trained = all(p.grad is not None for p in model.parameters())
    same = torch.equal(model.model.embed_tokens.weight, load().model.embed_tokens.weight)
    return [list(output.logits.shape), trained, same]


def saved_again():
    model = load()
    model.save_pretrained(WORK / "again")
    AutoTokenizer.from_pretrained(EXPORTED).save_pretrained(WORK / "again")
    again = load(folder=WORK / "again")
    code = sorted(p.name for p in (WORK / "again").glob("*.py"))
    return [torch.equal(logits_of(again), reference["logits"]), code]


def device_map_and_bfloat16():
    model = load(device_map="auto", dtype=torch.bfloat16)
    model.save_pretrained(WORK / "bfloat16")
    model = load(folder=WORK / "bfloat16", device_map="auto", dtype="auto")
    assert model.dtype == torch.bfloat16
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    error = (logits_of(model).float() - reference["logits"])[mask.bool()].abs().max()
    return (error / reference["logits"].abs().max()).item()


def trainer():
    model = load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in ids] * 2
    arguments = TrainingArguments(
        output_dir=str(WORK / "trainer"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    result = Trainer(model=model, args=arguments, train_dataset=data).train()
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
    return [result.global_step, result.training_loss, all(moved)]


def lora():
    torch.manual_seed(0)
    model = get_peft_model(load(), LoraConfig(r=2, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    adapted = logits_of(model)
    merged = logits_of(model.merge_and_unload())
    changed = (adapted - reference["logits"]).abs().max().item()
    return [losses, changed, (merged - adapted).abs().max().item()]


def tied():
    model = load(folder=TIED)
    model.save_pretrained(WORK / "tied")
    again = load(folder=WORK / "tied")
    is_tied = again.lm_head.weight is again.model.embed_tokens.weight
    stored = "lm_head.weight" in load_file(TIED / "model.safetensors")
    return [is_tied, stored, torch.equal(logits_of(again), logits_of(model))]


def resized_embeddings():
    model = load()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 5)
    wider = logits_of(model)
    same = torch.equal(wider[..., :size], reference["logits"])
    return [wider.shape[-1] - size, model.config.vocab_size - size, same]


def two_folders_in_one_process():
    # Each brings code of its own; the cache's layers come from the one imported last.
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    one, other = load(), load(folder=TIED)
    assert type(one) is not type(other)
    other.generate(ids, **options)
    return torch.equal(one.generate(ids, **options, eos_token_id=None), reference["greedy"])


def snippet_of_the_card():
    card = (EXPORTED / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    os.chdir(EXPORTED.parent)
    printed = []
    exec(code, {"print": lambda *values: printed.append(values)})
    return len(printed)


CHECKS = (
    sequence_classification,  # before anything else has told transformers of the decoder's class
    config_and_model_are_of_one_module,
    logits,
    logits_by_its_name_on_the_hub,
    hidden_states,
    greedy,
    beams,
    tokenizer,
    text_generation_pipeline,
    saved_again,
    device_map_and_bfloat16,
    trainer,
    lora,
    tied,
    resized_embeddings,
    two_folders_in_one_process,
    snippet_of_the_card,
)

results = {}
for check in CHECKS:
    try:
        results[check.__name__] = check()
    except Exception:
        results[check.__name__] = traceback.format_exc()
print("RESULTS", json.dumps(results))
