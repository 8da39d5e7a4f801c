"""Freezes an export of every architecture, as the present format version writes it.

    python tests/hub/freeze.py

writes tests/hub/frozen/VERSION.tar.xz: tiny models with their code, and the logits and tokens that
they gave. It is done once per version, when `FORMAT_VERSION` in zoo/core/versions.py is new; later
versions of the code must load it (test_older_folders.py), so there is no way to overwrite it.
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

import zoo
from zoo.core.versions import FORMAT_VERSION
from zoo.hub.export import export

HERE = Path(__file__).resolve().parent
FROZEN = HERE / "frozen"
SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
# So small that nine tokens see all that an architecture does, and an archive holds its weights.
FIELDS = {
    "rwkv6": {"decay_lora_rank": 4, "mix_lora_rank": 4},
    "rwkv7": {f"{name}_lora_rank": 4 for name in ("decay", "rate", "value", "gate")},
    "gated_deltanet": {"head_dim": 4, "value_head_dim": 4, "intermediate_size": 16},
    "lightning": {"softmax_layers": [1], "sliding_window": 4},
    "infini": {"segment_length": 4},
    "rmt": {"segment_length": 4, "num_memory_tokens": 2},
    "sliding_window": {"sliding_window": 4, "num_sink_tokens": 1},
    "block_recurrent": {
        "head_dim": 4,
        "num_states": 3,
        "sliding_window": 4,
        "recurrent_layers": [1],
        "num_buckets": 4,
        "max_distance": 8,
    },
    "longnet": {"segment_lengths": [4, 8], "dilation_rates": [1, 2]},
}
NEW_TOKENS = 4
# What an export holds for people, which loading does not read.
UNREAD = ("README.md", "LICENSE")


def tiny_model(architecture):
    """A small language model of an architecture, none of whose weights is without effect.

    They are multiples of a quarter of each tensor's largest, which an archive packs in three bits.
    """
    torch.manual_seed(0)
    fields = SIZES | {"pad_token_id": 0} | FIELDS.get(architecture.name, {})
    model = architecture.causal_lm(architecture.config(**fields))
    with torch.no_grad():
        for p in model.parameters():
            noisy = p + 0.2 * torch.randn(p.shape)
            step = noisy.abs().max() / 4
            p.copy_((noisy / step).round() * step)
    return model


def write_exports(folder):
    """Exports a model of each architecture into a folder, and records what they compute.

    recorded.safetensors holds input_ids and attention_mask [2, T], of which the second row begins
    with padding; for each model NAME.logits [tokens, vocab_size], of all that is no padding, in
    float64 and rounded to float32; and NAME.greedy [2, NEW_TOKENS].
    """
    ids = torch.randint(1, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    recorded = {"input_ids": ids * mask, "attention_mask": mask}
    inputs = dict(recorded)
    for name, architecture in zoo.MODELS.items():
        with tempfile.TemporaryDirectory() as checkpoint:
            tiny_model(architecture).save_pretrained(checkpoint)
            export(checkpoint, folder / name, license="apache-2.0")
        model = architecture.causal_lm.from_pretrained(folder / name, dtype=torch.float64).eval()
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            recorded[f"{name}.logits"] = model(**inputs).logits[mask.bool()].float()
            new = model.generate(**inputs, **options)[:, -NEW_TOKENS:]
        recorded[f"{name}.greedy"] = new.contiguous()
    save_file(recorded, folder / "recorded.safetensors")


def pack(folder, path):
    """Packs a folder, the same bytes for the same files."""
    with tarfile.open(path, "w:xz", preset=9) as archive:
        # Files that are alike lie together: the code of one architecture is mostly another's.
        for file in sorted(folder.rglob("*"), key=lambda file: (file.name, file)):
            if file.is_file() and file.name not in UNREAD:
                content = file.read_bytes()
                entry = tarfile.TarInfo(file.relative_to(folder).as_posix())
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def main():
    """Writes the archive; refuses if there is one."""
    path = FROZEN / f"{FORMAT_VERSION}.tar.xz"
    if path.exists():
        sys.exit(
            f"{path} is there: what version {FORMAT_VERSION} writes is frozen already. A change to "
            "the format is a new version (zoo/core/versions.py)."
        )
    disable_progress_bar()
    FROZEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        write_exports(Path(work))
        pack(Path(work), path)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
