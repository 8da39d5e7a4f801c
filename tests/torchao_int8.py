"""Every variant loaded with torchao's int8 weights, run, saved and loaded again.

python tests/torchao_int8.py FOLDER_WITH_TORCHAO SCRATCH
"""

import sys

sys.path.append(sys.argv[1])

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import zoo
from zoo.contract.subject import variants_of, zoo_subject


def check(name, variant, folder):
    """Prints a line that says whether the logits stay near those of the weights as they were."""
    subject = zoo_subject(name, variant)
    model, ids = subject.model(torch.float32), subject.ids(2, 40)
    model.save_pretrained(folder / "whole")
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    small = AutoModelForCausalLM.from_pretrained(folder / "whole", quantization_config=config)
    small.save_pretrained(folder / "small")
    again = AutoModelForCausalLM.from_pretrained(folder / "small")
    with torch.no_grad():
        expected, output = model(ids).logits, small(ids, use_cache=True)
        small(ids[:, :1], past_key_values=output.past_key_values)
        num_quantised = sum("Int8" in type(p).__name__ for p in small.parameters())
        error = (output.logits - expected).norm() / expected.norm()
        # Eight bits a weight: 0.4% of the largest of its row.
        good = num_quantised and error < 0.1 and torch.equal(again(ids).logits, output.logits)
    # Gradients on: what is trained beside quantised weights, as adapters are.
    small(ids[:, :5])
    print(
        f"variant {name} {variant} {'ok' if good else f'{error:.3f} {num_quantised}'}", flush=True
    )


if __name__ == "__main__":
    from pathlib import Path

    for name in zoo.MODELS:
        for variant in variants_of(name):
            check(name, variant, Path(sys.argv[2]) / f"{name}-{variant}")
