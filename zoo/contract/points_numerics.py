"""Points 9 and 10: 16 bits, extremes, and what a fresh model looks like."""

import contextlib
import fnmatch
import functools
import itertools
import math
import sys
import tempfile

import torch
import torch.nn.functional as F

from .compare import NAMES, gradients, loss_of
from .held_choices import SHARE_IN_32_BITS, held_for
from .paper_initialization import Of, Orthogonal
from .points_library import aligned
from .points_sequence import PIECES, cut
from .report import NotApplicable
from .subject import cache_tensors

# A figure may be off by sampling: this many standard errors.
STANDARD_ERRORS = 5
LOSS_BOUND = 0.7


def low_precision(subject, checks):
    """Point 9: 16 bits cost no more than they must, and nothing overflows.

    The error of a run is the mean absolute difference of its logits from those of a float64 model
    with the same, already rounded, weights. Plain PyTorch is the same 16-bit model with each of
    our operators replaced by its definition, one step at a time (`x` by `x_reference`). A model of
    another library has no such pair: for it, plain is the model run token by token, or, if that
    cannot be, nothing is compared. A model that chooses some of many is given the float64 model's
    choices in all runs, and those it would make otherwise are held to twice plain's as well.
    """
    ids = subject.ids(2, 131)
    # As far as learned positions reach, where there are such.
    length = min(4200, getattr(subject.config, "max_position_embeddings", None) or 4200)
    many = subject.ids(1, length)
    largest_output = functools.cache(functools.partial(_largest_output, subject, many))
    largest_gradients = {}  # by factor; in exact numbers, so both types ask for the same
    for dtype in (torch.bfloat16, torch.float16):
        name = NAMES[dtype]
        with checks.case(name), torch.no_grad():
            model, held = subject.model(dtype), held_for(subject, dtype, ids)
            exact = subject.forward(subject.model(dtype).double(), ids).logits
            with held.given_to(model):
                plain = _error(_plain_logits(subject, model, ids), exact)
            share = held.share_made_otherwise()
            runs = {"whole": (131,)} | PIECES
            for way, sizes in runs.items():
                with checks.case(way):
                    with held.given_to(model):
                        logits, cache = subject.run(model, ids, cut(131, sizes))
                    ratio = _error(logits, exact) / max(plain, torch.finfo(dtype).tiny)
                    checks.below("error / plain error", ratio, 2)
                    held.check(checks, 2 * share + SHARE_IN_32_BITS)
            _state_dtypes(checks, model, cache)
        with checks.case(f"{name}, autocast"), torch.no_grad():
            model = subject.model(torch.float32)
            exact = subject.forward(subject.model(torch.float64), ids).logits
            held = held_for(subject, torch.float32, ids)
            with torch.autocast("cpu", dtype), held.given_to(model):
                plain = _error(_plain_logits(subject, model, ids), exact)
                logits, cache = subject.run(model, ids, cut(131, (7, 64, 1, 59)))
            checks.below("error / plain error", _error(logits, exact) / plain, 2)
            _state_dtypes(checks, model, cache)
        with checks.case(f"{name}, extremes"), torch.no_grad():
            _extremes(subject, checks, dtype, many, largest_output, largest_gradients)
    with checks.case("bf16"), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        subject.model(torch.float32).save_pretrained(folder)
        model = subject.model(torch.float32).to(torch.bfloat16)
        loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16)
        found = subject.forward(aligned(loaded), ids).logits
        same = torch.equal(found, subject.forward(model, ids).logits)
        checks.holds("moved = loaded as bf16, bit for bit", same)
    with checks.case("on a GPU"), torch.no_grad():
        if not torch.cuda.is_available():
            raise NotApplicable("no GPU")
        for dtype in (torch.bfloat16, torch.float16):
            held = held_for(subject, dtype, ids)
            exact = subject.forward(subject.model(dtype).double(), ids).logits
            model = subject.model(dtype).to("cuda")
            with held.given_to(model):
                plain = _error(_plain_logits(subject, model, ids.cuda()).cpu(), exact)
                error = _error(subject.forward(model, ids.cuda()).logits.cpu(), exact)
            checks.below(f"{NAMES[dtype]}: error / plain error", error / plain, 2)


def _error(logits, exact):
    return (logits.double() - exact).abs().mean().item()


def _plain_logits(subject, model, ids):
    with plain_operators(model) as replaced:
        if replaced:
            return subject.forward(model, ids).logits
    return subject.run(model, ids, cut(ids.shape[1], (1,)))[0]


@contextlib.contextmanager
def plain_operators(model):
    """Replaces the zoo's operators by their definitions in what a model is made of.

    Yields the names of what was replaced.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    # And where functions that these use are at home: one of a layer may hand an operator out.
    homes = {getattr(x, "__module__", None) for module in modules for x in vars(module).values()}
    modules |= {sys.modules[x] for x in homes if str(x).startswith("zoo.layers.")}
    replaced = []
    for module in modules:
        for name, function in list(vars(module).items()):
            home = getattr(function, "__module__", None) or ""
            if not home.startswith("zoo.kernels."):
                continue
            reference = getattr(sys.modules[home], f"{name}_reference", None)
            if reference is not None:
                replaced.append((module, name, function))
                setattr(module, name, reference)
    try:
        yield [name for _, name, _ in replaced]
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _state_dtypes(checks, model, cache):
    """Accumulators, which declare no dtype of their own, are float32."""
    if not hasattr(model.base_model, "state_specs"):
        checks.not_run("accumulators in float32", "the model does not declare its state")
        return
    wrong = sum(
        layer.tensors[name].dtype != (spec.dtype or torch.float32)
        for layer, specs in zip(cache.layers, model.base_model.state_specs())
        for name, spec in specs.items()
    )
    checks.below("state tensors of another dtype than declared", wrong, 0)


def _extremes(subject, checks, dtype, ids, largest_output, largest_gradients):
    length, factors = ids.shape[1], [1]
    limit = torch.finfo(dtype).max
    if subject.pretrained is None:
        # Eight times the weights of a trained model overflow the MLP of any architecture in fp16,
        # and RWKV-7's output is of the fourth power in its weights: as far as numbers reach.
        factors += itertools.islice((x for x in (8, 4, 2) if largest_output(x) <= limit), 1)
    while factors:
        factor = factors.pop(0)
        if largest_gradients.get(factor, 0) > limit:
            # Of what feeds back they grow by a factor with each segment, in exact numbers too.
            factors += [factor // 2] if factor > 2 else []
            continue
        model = _enlarged(subject, factor).to(dtype)
        with torch.enable_grad():
            runs = {"whole": subject.run(model, ids)}
            grads = gradients(model, loss_of(runs["whole"][0]))
        if factor > 1 and factor not in largest_gradients and _not_finite(grads.values()):
            largest_gradients[factor] = _largest_gradient(subject, ids, factor)
            if largest_gradients[factor] > limit:
                factors.append(factor)
                continue
        runs["in pieces of 1000"] = subject.run(model, ids, cut(length, (1000,)))
        name = f"{length} tokens" + (f", weights x {factor}" if factor > 1 else "")
        results = {
            f"{name}, {way}": [logits, *cache_tensors(cache).values()]
            for way, (logits, cache) in runs.items()
        }
        results[f"{name}, gradients"] = grads.values()
        for what, tensors in results.items():
            checks.below(f"{what}: NaN or infinite", _not_finite(tensors), 0)


def _not_finite(tensors):
    """How many numbers are not."""
    return sum((~torch.isfinite(x)).sum().item() for x in tensors if x.is_floating_point())


def _largest_gradient(subject, ids, factor):
    """The largest number of the gradients where matrices are that much larger, in float64."""
    model = _enlarged(subject, factor).double()
    with torch.enable_grad():
        grads = gradients(model, loss_of(subject.run(model, ids)[0]))
    return max(x.abs().max().item() for x in grads.values())


def _enlarged(subject, factor):
    """The model in float32 with larger matrices; norms' weights would multiply with all of them."""
    model = subject.model(torch.float32)
    for weight in model.parameters():
        weight *= factor if weight.ndim > 1 else 1
    return model


def _largest_output(subject, ids, factor):
    """The largest number that a module gives out where matrices are that much larger."""
    largest = 0.0

    def look(module, inputs, output):
        nonlocal largest
        if torch.is_tensor(output) and output.is_floating_point():
            largest = max(largest, output.abs().max().item())

    model = _enlarged(subject, factor)
    for module in model.modules():
        module.register_forward_hook(look)
    subject.forward(model, ids)
    return largest


def initialization(subject, checks):
    """Point 10: everything learns, and begins where the paper begins."""
    ids = subject.ids(4, 128)
    with checks.case("gradients"):
        model = subject.model(torch.float32)
        logits = subject.forward(model, ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        grads = gradients(model, loss)
        dead = [name for name, x in grads.items() if not x.any()]
        broken = [name for name, x in grads.items() if not torch.isfinite(x).all()]
        for what, names in (("without any", dead), ("not finite", broken)):
            with checks.case(f"parameters {what}" + "".join(f", {x}" for x in names[:3])):
                checks.below("", len(names), 0)
    fresh = subject.build(0).float().eval()
    with checks.case("initial loss"), torch.no_grad():
        logits = subject.forward(fresh, ids).logits
        targets = subject.ids(*ids.shape, seed=1)
        if subject.config.get_text_config().tie_word_embeddings:
            # What went in is still in what comes out: its logit says nothing of the loss on text.
            logits.scatter_(-1, ids[..., None], -math.inf)
            targets = torch.where(targets == ids, ids % (subject.vocab_size - 1) + 1, targets)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        name, expected = "log(vocab)", math.log(subject.vocab_size)
        if subject.is_ours and fresh.get_output_embeddings() is None:
            # Scores that are all the same are not the same share for each word of several clusters.
            even = fresh.lm_head(logits.new_zeros(fresh.config.hidden_size)).expand(logits.shape)
            even = even.masked_fill(logits == -math.inf, -math.inf)
            name = "that of even scores"
            expected = F.cross_entropy(even.flatten(0, 1), targets.flatten()).item()
        checks.below(f"|loss - {name}|, nats", abs(loss - expected), LOSS_BOUND)
    with checks.case("initialisation of the paper"):
        if subject.initialization is None:
            raise NotApplicable("no table of expected statistics was given")
        _statistics(subject, checks, fresh)


def _statistics(subject, checks, fresh):
    table = subject.initialization
    for name, _ in fresh.named_parameters():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in table):
            checks.holds(name, False, "no entry", "an entry")
    for pattern, values in table.items():
        weights = [x for name, x in fresh.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not weights:
            checks.holds(pattern, False, "no parameter", "a parameter")
            continue
        if isinstance(values, Orthogonal):
            error = max(_distance_from_orthogonal(weight, values.gain) for weight in weights)
            checks.below(f"{pattern}: orthogonal, gain {values.gain:.4g}", error, 1e-5)
            continue
        x = torch.cat([weight.detach().flatten() for weight in weights]).double()
        if isinstance(values, Of):
            x, values = values.function(x), values.statistics
        if isinstance(values, list):
            expected = torch.tensor(values, dtype=torch.float64)
            error = (x - expected).abs().max().item() if len(x) == len(expected) else math.inf
            # Theirs and ours are computed in float32, from numbers of order one to ten.
            checks.below(f"{pattern}: distance from the schedule", error, 1e-5)
            continue
        mean, std, distribution = values
        if distribution == "constant":
            distance = (x - torch.tensor(mean)).abs().max().item()
            checks.below(f"{pattern}: distance from {mean:g}", distance, 1e-7 * abs(mean))
            continue
        error = std / len(x) ** 0.5
        off = abs(x.mean().item() - mean) / error
        checks.below(f"{pattern}: mean {mean:g}, off by standard errors", off, STANDARD_ERRORS)
        # The variance of a sample variance follows from the kurtosis: 3 if normal, 9/5 if uniform,
        # in between if normal but cut off at two deviations.
        kurtosis = {"normal": 3.0, "truncated": 2.3655, "uniform": 1.8}[distribution]
        error = std * ((kurtosis - 1) / (4 * len(x))) ** 0.5
        off = abs(x.std().item() - std) / error
        checks.below(f"{pattern}: std {std:.4g}, off by standard errors", off, STANDARD_ERRORS)
        measured = ((x - x.mean()) / x.std()).pow(4).mean().item()
        # 24 / n is the variance of a normal sample's kurtosis; a uniform one's is smaller.
        off = abs(measured - kurtosis) / (24 / len(x)) ** 0.5
        checks.below(f"{pattern}: {distribution}, kurtosis off by standard errors", off, 6)


def _distance_from_orthogonal(weight, gain):
    """How far the singular values are from the gain, relative to it."""
    singular = torch.linalg.svdvals(weight.detach().double())
    return (singular / gain - 1).abs().max().item()
