"""The shared decoder: bad input, the loss in chunks, constants, configs."""

import copy
import json
import logging

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

import zoo
from zoo.contract.compiling import leave_one_layer_of_each_kind
from zoo.core.length_limit import NAME, length_limit
from zoo.core.state import SlidingStateLayer, new_cache

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))

architectures = pytest.mark.parametrize("architecture", zoo.MODELS.values(), ids=zoo.MODELS)


def build(architecture, **fields):
    torch.manual_seed(0)
    return architecture.causal_lm(architecture.config(**TINY | fields))


@architectures
@pytest.mark.parametrize("scale", [None, 7])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunked_loss_is_the_loss(architecture, chunk, scale):
    model = build(architecture).train()
    labels = IDS.clone()
    labels[:, 3:5] = -100
    expected = model(IDS, labels=labels, num_items_in_batch=scale).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss_chunk_size = chunk
    output = model(IDS, labels=labels, num_items_in_batch=scale)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        # Two orders of summation in float32; RWKV's small embeddings have gradients of 10^3.
        atol = 1e-6 * max(gradient.abs().max().item(), 10)
        torch.testing.assert_close(p.grad, gradient, rtol=1.3e-6, atol=atol)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    again = model(IDS, shift_labels=shifted, num_items_in_batch=scale).loss
    torch.testing.assert_close(again, expected)
    model.eval()
    assert model(IDS, labels=labels).logits is not None


@architectures
def test_chunked_loss_never_holds_all_logits(architecture):
    """The largest tensor made in a training step is that of a chunk, not of the batch."""
    model = build(architecture, vocab_size=5000).train()
    model.loss_chunk_size = 64
    ids = torch.zeros(4, 64, dtype=torch.long)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.shape[-1:] == (5000,):
                largest = max(largest, result.numel())
            return result

    with Watch():
        model(ids, labels=ids).loss.backward()
    assert largest == 64 * 5000


@architectures
def test_bad_inputs(architecture):
    model = build(architecture).eval()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(IDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"at least one token, got input of shape \[2, 0\]"):
        model(IDS[:, :0])
    with pytest.raises(ValueError, match="hides every token"):
        model(IDS, attention_mask=torch.zeros_like(IDS))
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 11\]"):
        model(IDS, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"position_ids is \[2, 11\]"):
        model(IDS, position_ids=torch.arange(4)[None])
    for bounds in ([0, 5], [0, 30], [2, 11], [0, 6, 4, 11]):
        with pytest.raises(
            ValueError, match="cu_seq_lens_q grows from 0 to the number of tokens 11"
        ):
            model(IDS[:1], cu_seq_lens_q=torch.tensor(bounds))
    with pytest.raises(ValueError, match="one packed row"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 11]))


@architectures
def test_says_that_it_gives_no_attention_weights(architecture, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.logging.get_logger().warning_once.cache_clear()
    model = build(architecture).eval()
    assert model(IDS).attentions is None and "output_attentions" not in caplog.text
    assert model(IDS, output_attentions=True).attentions is None
    assert "output_attentions gives None" in caplog.text


@architectures
def test_generates_by_itself(architecture):
    """transformers wants the mixin among a class's own bases, and looks there."""
    assert GenerationMixin in architecture.causal_lm.__bases__


@architectures
def test_unknown_and_wrong_fields(architecture):
    with pytest.raises(ValueError, match="no field 'hiden_size'; did you mean hidden_size?"):
        architecture.config(hiden_size=64)
    with pytest.raises(Exception, match="hidden_size"):
        architecture.config(hidden_size="wide")
    if architecture.name != "rwkv4":  # which has no heads
        with pytest.raises(StrictDataclassClassValidationError, match="multiple of"):
            architecture.config(**TINY | {"num_attention_heads": 5})


@architectures
def test_what_is_saved_loads(architecture, tmp_path):
    config = architecture.config(**TINY)
    config.hiden_size = 64
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.hidden_size == config.hidden_size and not hasattr(again, "hiden_size")


@architectures
def test_layer_types_say_what_they_are(architecture):
    """accelerate refuses to split the sequence of a recurrent model when it sees these names."""
    layer_types = architecture.config(**TINY).layer_types
    assert all("linear_attention" in t or "sliding_attention" in t for t in layer_types)


@architectures
def test_constants_survive_dtypes_and_meta(architecture, tmp_path):
    from zoo.core.base import Constant

    model = build(architecture)
    constants = {n: m for n, m in model.named_modules() if isinstance(m, Constant)}
    if not constants:
        pytest.skip("it has none")
    expected = {name: module.compute() for name, module in constants.items()}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.device("meta"):
        empty = architecture.causal_lm(architecture.config(**TINY))
    empty = empty.to_empty(device="cpu")
    for other in (model.bfloat16(), model.half(), model.double(), loaded, empty):
        for name, value in expected.items():
            constant = other.get_submodule(name)(torch.device("cpu"))
            assert constant.dtype == torch.float64
            assert torch.equal(constant, value), name


@architectures
def test_config_round_trip(architecture, tmp_path):
    for fields in architecture.config.variants.values():
        config = architecture.config(**TINY | fields)
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is architecture.config
        again._name_or_path = config._name_or_path
        assert again.to_dict() == config.to_dict()


@architectures
def test_hidden_states_come_back_padded(architecture):
    model = build(architecture).eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[1, 5:7] = 0
    padded = model.model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(padded) == TINY["num_hidden_layers"] + 1
    for row in range(2):
        kept = mask[row].bool()
        alone = model.model(IDS[row : row + 1, kept], output_hidden_states=True).hidden_states
        for a, b in zip(padded, alone, strict=True):
            assert a.shape == (2, 11, 32)
            torch.testing.assert_close(a[row, kept], b[0], rtol=1e-4, atol=1e-5)


@architectures
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs")
def test_reentrant_checkpointing_where_it_loses_no_gradients(architecture):
    model = build(architecture).train()
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        model(IDS, past_key_values=new_cache(model.config))
    model.model.replay_segment_length = 4
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        model(IDS, labels=IDS)
    with torch.no_grad():
        model(IDS, past_key_values=new_cache(model.config))
    if architecture.name == "block_recurrent":
        model = architecture.causal_lm(architecture.config(**TINY, feedback=True)).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="set use_reentrant=False"):
            model(IDS)


@architectures
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_step_is_compiled_once(architecture, batch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    # A state that grows is another shape at each step, and another graph.
    fields = {"memory_windows": 1} if architecture.name == "long_llama" else {}
    model = build(architecture, **fields).eval()
    leave_one_layer_of_each_kind(model.base_model)
    compiled = torch.compile(model, backend=count, dynamic=False, fullgraph=True)
    ids = IDS[:batch]
    caches = [model(ids, use_cache=True).past_key_values for _ in range(2)]
    mask = torch.ones_like(ids)
    steps = 4 if model.has_constant_state else 2
    for _ in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        expected, found = (
            run(
                **model.prepare_inputs_for_generation(
                    ids, 1, past_key_values=cache, attention_mask=mask
                )
            ).logits
            for run, cache in zip((model, compiled), caches)
        )
        torch.testing.assert_close(found, expected)
    # A state that grows is another shape at each step, and another graph.
    assert len(graphs) == (1 if model.has_constant_state else steps)
    model(ids, past_key_values=caches[1])
    assert [cache.get_seq_length() for cache in caches] == [11 + steps, 11 + steps + 11]
    torch._dynamo.reset()


def test_pytest_does_not_ask_for_what_torch_traces():
    """Its handlers on that log, which tests/conftest.py keeps off, take a twentieth of tracing."""
    handlers = logging.getLogger("torch.__trace").handlers
    assert [x for x in handlers if type(x).__module__.startswith("_pytest")] == []


@architectures
def test_classifier(architecture, tmp_path):
    torch.manual_seed(0)
    config = architecture.config(**TINY, num_labels=3, pad_token_id=0)
    model = architecture.sequence_classifier(config).eval()
    ids = IDS.clamp(min=1)
    ids[0, 8:] = 0
    logits = model(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(logits[:1], model(ids[:1, :8]).logits)
    assert logits.shape == (2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@architectures
def test_fused_loss_is_the_loss(architecture, z_loss):
    pytest.importorskip("liger_kernel")
    model = build(architecture).train().cuda()
    model.z_loss = z_loss
    ids = IDS.cuda()
    expected = model(ids, labels=ids).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss_chunk_size = 4
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)


@architectures
def test_fp16_mixer_with_large_projections(architecture):
    """A mixer multiplies three projections; fp16 ends at 65,504."""
    for fields in architecture.config.variants.values():
        model = build(architecture, **fields).half().eval()
        mixer, norm = model.model.layers[0].mixer, model.model.layers[0].mixer_norm
        outputs = []
        mixer.register_forward_hook(
            lambda module, args, output, outputs=outputs: outputs.append(output[0])
        )
        # What RWKV-7 adds after its norm is of the third power in them, and 10^3 is what fits.
        factor = 10 if architecture.name == "rwkv7" else 100
        with torch.no_grad():
            for module in mixer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight *= factor
            if norm.weight is not None:
                norm.weight *= 4
            model(IDS)
        assert outputs[0].isfinite().all()


@architectures
def test_a_limit_of_length_is_a_number_or_not_there(architecture, tmp_path):
    """Other libraries compare it with a number wherever a config has it."""
    config = architecture.config(**TINY)
    assert not hasattr(config, "max_position_embeddings")
    if "max_position_embeddings" not in config.__dataclass_fields__:
        return
    softmax = {"softmax_layers": [1]} if architecture.name == "lightning" else {}
    limited = architecture.config(**TINY | softmax, max_position_embeddings=40)
    path = tmp_path / "config.json"
    for given, limit in ((config, None), (limited, 40)):
        given.save_pretrained(tmp_path)
        saved = json.loads(path.read_text())
        assert saved.get(NAME) == limit and (NAME in saved) == bool(limit)
        found = [AutoConfig.from_pretrained(tmp_path), copy.deepcopy(given)]
        path.write_text(json.dumps(saved | {NAME: limit}))  # null, in folders of before
        for again in (*found, AutoConfig.from_pretrained(tmp_path)):
            assert getattr(again, NAME, None) == limit and hasattr(again, NAME) == bool(limit)
    limited.max_position_embeddings = None
    assert not hasattr(limited, NAME) and length_limit(limited) is None
    with pytest.raises(AttributeError, match="has no limit of length"):
        limited.max_position_embeddings  # noqa: B018
    with pytest.raises(Exception, match="max_position_embeddings"):
        config.max_position_embeddings = "long"


def test_a_state_is_never_dropped_for_a_layer_of_another_folder():
    """Layers of another copy of this module are replaced while they are empty, and then only."""
    model, other = build(zoo.MODELS["retnet"]).eval(), SlidingStateLayer()
    held = model(IDS, use_cache=True).past_key_values.layers
    other._layer_type = model.config.layer_types[0]
    cache = new_cache(model.config)
    cache.layers[0] = other
    assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS).logits)
    assert type(cache.layers[0]) is type(held[0])
    other.tensors, other.clock = held[0].tensors, held[0].clock
    cache = new_cache(model.config)
    cache.layers[0] = other
    with pytest.raises(ValueError, match="expected a cache of 2 recurrent state layers"):
        model(IDS, past_key_values=cache)
