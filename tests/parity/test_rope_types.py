"""The angles of every rope_type, and one Mistral under eight of them, against the goldens.

transformers computes scaled angles in float32, and ours of those types are its numbers; the goldens
have the exact ones too, which lie within two units in the last place of a float32.
"""

import json
import math
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM

from zoo import SlidingWindowConfig
from zoo.hub.convert import convert
from zoo.kernels.windowed_attention import windowed_attention_reference
from zoo.layers.positions import RotaryPositions, rotate

FLOAT32 = 2 * torch.finfo(torch.float32).eps
SIZES = {"d16": (16, 32), "d128": (128, 4096)}  # head_dim, trained length


def power(head_dim, exponent):
    """Giraffe's power scaling as factors of longrope."""
    pairs = head_dim // 2
    return [(1 - j / pairs) ** -exponent for j in range(pairs)]


def longrope(short, long, **fields):
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long} | fields


def rope_parameters(name, head_dim):
    """What says a variant of the golden in our config's terms."""
    half = [0.5] * (head_dim // 2)
    return {
        "default": {},
        "abf_5e5": {"rope_theta": 5e5},
        "ntk_4": {"rope_theta": 1e4 * 4 ** (head_dim / (head_dim - 2))},
        "linear_4": {"rope_type": "linear", "factor": 4.0},
        "giraffe_scale4": {"rope_type": "linear", "factor": 4.0},
        "dynamic_2": {"rope_type": "dynamic", "factor": 2.0},
        "yarn_4": {"rope_type": "yarn", "factor": 4.0},
        "yarn_4_untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        "yarn_4_beta_8_2": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2},
        "llama3_8": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "proportional_half": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        "giraffe_power_0.5": longrope(half, power(head_dim, 0.5), attention_factor=1.0),
        "giraffe_power_0.1": longrope(half, power(head_dim, 0.1), attention_factor=1.0),
    }[name]


EXACT = ("default", "abf_5e5", "ntk_4")
ROUNDED = (
    "linear_4",
    "giraffe_scale4",
    "yarn_4",
    "yarn_4_untruncated",
    "yarn_4_beta_8_2",
    "llama3_8",
    "proportional_half",
    "giraffe_power_0.5",
    "giraffe_power_0.1",
)


def rotary(name, size):
    head_dim, length = SIZES[size]
    config = SlidingWindowConfig(
        head_dim=head_dim,
        num_attention_heads=2,
        hidden_size=2 * head_dim,
        max_position_embeddings=length,
        rope_parameters=rope_parameters(name, head_dim),
    )
    return RotaryPositions(config), length


def angles_of(rotation, position=1):
    """What one position turns by, [K / 2], and the factor on it; longrope's beyond its length."""
    if rotation.rope_type == "longrope":
        return rotation.long_angle("cpu"), rotation.scaling
    return rotation.angle("cpu"), rotation.scaling


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_angles(name, size):
    golden = golden_tensors("ops-rope")
    angle_K, factor = angles_of(rotary(name, size)[0])
    expected_K = golden[f"{size}.{name}.inv_freq"]
    bound = 1e-14 if name in EXACT else FLOAT32
    torch.testing.assert_close(angle_K, expected_K, rtol=bound, atol=0)
    assert factor == pytest.approx(float(golden[f"{size}.{name}.attention_factor"]), rel=1e-14)
    numbers = golden.get(f"{size}.{name}.inv_freq_float32")
    if numbers is not None:
        assert torch.equal(angle_K, numbers.double())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("times", [1, 2, 4])
def test_dynamic_angles_at_a_length(times, size):
    """A text's last token turns by the angles of its length."""
    golden = golden_tensors("ops-rope")
    rotation, length = rotary("dynamic_2", size)
    position = times * length - 1
    cos_K = rotation(torch.tensor([[position]]))[0].flatten()
    expected_K = (position * golden[f"{size}.dynamic_2_at_{times}L.inv_freq"]).cos()
    # Of an angle of some thousand radians.
    torch.testing.assert_close(cos_K, expected_K, rtol=0, atol=1e-12 * times)


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_attention(name):
    golden = golden_tensors("ops-rope")
    rotation, _ = rotary(name, "d16")
    leaves = [golden[x].clone().requires_grad_() for x in "qkv"]
    q_BTHK, k_BTHK, v_BTHV = (x.transpose(1, 2) for x in leaves)
    offset = 0
    if rotation.rope_type == "longrope":
        offset = rotation.trained_length  # scores see differences of positions alone
    turned = rotation(torch.arange(q_BTHK.shape[1])[None] + offset)
    o_BTHV = windowed_attention_reference(rotate(q_BTHK, *turned), rotate(k_BTHK, *turned), v_BTHV)
    difference = (o_BTHV.transpose(1, 2) - golden[f"o.{name}"]).abs().max().item()
    # Forty positions times a float32's error of an angle, in scores of a few units.
    bound = 1e-12 if name in EXACT else 1e-5
    assert difference < bound
    if f"{name}.grad_q" in golden:
        grads = torch.autograd.grad(o_BTHV, leaves, golden["cotangent"].transpose(1, 2))
        for x, grad in zip("qkv", grads):
            assert (grad - golden[f"{name}.grad_{x}"]).abs().max() < bound


def test_giraffes_truncated_basis_has_angles_of_zero():
    """Why no factor says it: zero is an angle divided by infinity."""
    golden = golden_tensors("ops-rope")
    angle_K = golden["d128.giraffe_truncate_4096.inv_freq"]
    assert (angle_K == 0).sum() == 4
    infinite = [1.0] * 60 + [math.inf] * 4
    with pytest.raises(StrictDataclassClassValidationError, match="64 numbers above 0"):
        SlidingWindowConfig(
            head_dim=128,
            hidden_size=256,
            num_attention_heads=2,
            rope_parameters=longrope([1.0] * 64, infinite),
            max_position_embeddings=4096,
        )


@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_clex_before_it_is_trained_is_dynamic(act):
    """Its solver starts as dynamic NTK of factor 2; what it learns beyond has no equivalent."""
    untrained = golden_tensors("ops-clex")[f"{act}.inv_freq_untrained"]  # [t, K / 2]
    config = SlidingWindowConfig(
        head_dim=16,
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0},
    )
    rotation = RotaryPositions(config)
    lengths_T = 16 * torch.arange(1, 1 + len(untrained))[None]
    scale_TK = rotation.dynamic_scale(lengths_T - 1, torch.float64)[0]
    # Of its solver's steps of 0.1.
    torch.testing.assert_close(rotation.angle("cpu") * scale_TK, untrained, rtol=2e-6, atol=0)


MODEL = "rope-scaling-mistral-hf"
CASES = {
    "default": "default",
    "abf": "abf",
    "linear": "linear.float32_numbers",
    "dynamic": "dynamic.steps",
    "yarn": "yarn.float32_numbers",
    "yarn_untruncated": "yarn_untruncated.float32_numbers",
    "llama3": "llama3.float32_numbers",
    "longrope": "longrope.float32_numbers.steps",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden's Mistral, converted with plain RoPE."""

    source = tmp_path_factory.mktemp("official")
    shutil.copy(golden_folder(MODEL) / "model.safetensors", source)
    values = json.loads((golden_folder(MODEL) / "config.json").read_text())
    values |= values.pop("cases")["default"]
    del values["attn_implementation"]
    (source / "config.json").write_text(json.dumps(values))
    convert("hf-mistral", source, source / "ours")
    return source / "ours"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_mistral_under_every_type(case, folder):
    """Whole, and in pieces, also where transformers' own depends on how a text is cut."""

    fields = json.loads((golden_folder(MODEL) / "config.json").read_text())["cases"][case]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **fields).eval()
    golden = golden_tensors(MODEL)
    ids, expected = golden["input_ids"], golden[f"logits_f64.{CASES[case]}"]
    for sizes in ([80], [20, 30, 1, 29]):
        cache, logits = None, []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, [*logits, output.logits]
        assert (torch.cat(logits, dim=1) - expected).abs().max() < 1e-9
