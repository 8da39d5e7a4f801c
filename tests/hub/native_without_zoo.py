"""Loads folders of transformers' own classes where there is no zoo. Run by test_native_export.py.

    python native_without_zoo.py IDS OUT FOLDER...

Logits of the token ids in IDS go to OUT, by folder; what JSON can hold goes to standard output.
"""

import json
import os
import re
import sys
from pathlib import Path

assert "zoo" not in sys.modules
for name in ("zoo", "kernels", "triton", "fla"):
    sys.modules[name] = None

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

IDS, OUT, *FOLDERS = map(Path, sys.argv[1:])
ids = load_file(IDS)["ids"]
logits, found = {}, {}
for folder in FOLDERS:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits[folder.name] = model(ids).logits
        # Row by row: transformers' RWKV-4 mixes the rows of a batch when it decodes.
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        greedy = torch.cat([model.generate(row, **options) for row in ids.split(1)])
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    os.chdir(folder.parent)
    printed = []
    exec(snippet, {"print": lambda *values, printed=printed: printed.append(values)})
    found[folder.name] = {
        "class": [type(model).__module__.split(".")[0], type(model).__name__],
        "greedy": greedy.tolist(),
        "tokens": AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"],
        "eos": model.generation_config.eos_token_id,
        "printed": len(printed),
    }
save_file(logits, OUT)
print("RESULTS", json.dumps(found))
