"""Loads an exported folder as a machine without this repository would, and continues a prompt.

python recipes/try_export.py exported/retnet_demo ["a prompt"]
"""

import os
import sys

# Neither the network nor, below, our package: what is left is the folder, torch and transformers.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.modules["zoo"] = None  # importing it fails from here on

PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'


def main():
    """Loads the folder named on the command line; prints a prompt and its continuation."""
    if len(sys.argv) < 2:
        sys.exit("usage: python recipes/try_export.py EXPORTED [PROMPT]")
    folder = sys.argv[1]
    if not os.path.isfile(os.path.join(folder, "config.json")):
        sys.exit(f"error: no exported model at {folder}; make one with: zoo export RUN {folder}")
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # one token at a time is too little work to share
    prompt = sys.argv[2] if len(sys.argv) > 2 else PROMPT
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(
        f"{folder}: {type(model).__name__} from {type(model).__module__.split('.')[0]}, "
        f"{model.num_parameters():,} parameters, loaded without importing zoo"
    )
    # In training every document followed an end-of-text token.
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[tokenizer.eos_token_id, *ids]])
    torch.manual_seed(0)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=200,
        do_sample=True,
        temperature=0.7,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
