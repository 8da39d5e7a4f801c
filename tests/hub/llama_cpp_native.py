"""Our models in llama.cpp: its own converter makes GGUF of them, its logits are compared. By hand.

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    pip install sentencepiece ./llama_cpp_python-*/      # builds llama.cpp: minutes on many CPUs
    python tests/hub/llama_cpp_native.py llama_cpp_python-*/vendor/llama.cpp

Small random models of RWKV-6, RWKV-7 and Mistral go to the native format that
convert_hf_to_gguf.py reads, which converts them, in float32; llama.cpp reads a few hundred tokens,
in one pass and token by token. Without the second step of the above, --only-convert.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from zoo.hub.convert import convert_back
from zoo.hub.export import export

sys.path.insert(0, str(Path(__file__).parent))
from fla_models import random_model

BOUND = 1e-5  # float32 in another order, relative to the largest logit
LENGTH = 200
VOCAB = 300
SIZES = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
CASES = {
    "rwkv6": ("rwkv6", SIZES, "rwkv6-hf"),
    "rwkv7": ("rwkv7", SIZES, "native"),
    "mistral": ("sliding_window", SIZES | HEADS | {"sliding_window": None}, "native"),
}


def write_native(architecture, fields, format, folder):
    """A model of ours in `folder`, for llama.cpp's converter; returns the model."""
    model = random_model(architecture, fields)
    model.save_pretrained(folder.parent / "ours")
    if format == "native":
        export(folder.parent / "ours", folder, format="native")
    else:
        convert_back(format, folder.parent / "ours", folder)
    if architecture == "sliding_window":
        mistral_tokenizer().save_pretrained(folder)
    else:
        # As the World models' file, but bytes alone.
        lines = [f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)]
        (folder / "rwkv_vocab_v20230424.txt").write_text("".join(lines))
    return model


def mistral_tokenizer():
    """A tokenizer of Llama's kind: the converter knows no other of a Mistral's."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    names += [f"<extra{i}>" for i in range(VOCAB - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def to_gguf(llama_cpp, folder, out):
    """Runs llama.cpp's converter, with the gguf package that came with it."""
    environment = os.environ | {"PYTHONPATH": f"{llama_cpp / 'gguf-py'}", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(folder)]
    run = subprocess.run(
        [*script, "--outtype", "f32", "--outfile", str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{folder.name}: the converter failed\n{run.stderr[-3000:]}")


def differences(gguf, model):
    """Between the logits of llama.cpp and of ours, relative to the largest, by way of running."""
    from llama_cpp import GGML_TYPE_F32, Llama

    ids = torch.randint(3, VOCAB - 41, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0]
    # Otherwise keys and values of attention are kept in float16.
    options = {"n_ctx": 512, "logits_all": True, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    found = {}
    for way, step in {"one pass": LENGTH, "token by token": 1}.items():
        theirs = Llama(str(gguf), verbose=False, **options)
        for start in range(0, LENGTH, step):
            theirs.eval(ids[0, start : start + step].tolist())
        logits = torch.tensor(theirs.scores[:LENGTH])
        found[way] = ((logits - expected).abs().max() / expected.abs().max()).item()
        theirs.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="folder with convert_hf_to_gguf.py")
    parser.add_argument("--only-convert", action="store_true", help="do not run llama.cpp")
    arguments = parser.parse_args()
    worst = 0.0
    for name, (architecture, fields, format) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            model = write_native(architecture, fields, format, folder / name)
            to_gguf(arguments.llama_cpp.resolve(), folder / name, folder / "model.gguf")
            size = (folder / "model.gguf").stat().st_size
            if arguments.only_convert:
                print(f"{name}: {size:,} bytes of GGUF", flush=True)
                continue
            found = differences(folder / "model.gguf", model)
            worst = max(worst, *found.values())
            figures = ", ".join(f"{way} {x:.1e}" for way, x in found.items())
            print(f"{name}: {size:,} bytes of GGUF; {figures}", flush=True)
    if not arguments.only_convert:
        print(f"greatest difference {worst:.1e}, bound {BOUND:.0e}")
    return 0 if worst < BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
