"""Points 9 and 10: 16 bits, extremes, and what a fresh model looks like."""

import contextlib
import fnmatch
import math
import sys
import tempfile

import torch
import torch.nn.functional as F

from .compare import NAMES, gradients
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
    cannot be, nothing is compared.
    """
    ids = subject.ids(2, 131)
    for dtype in (torch.bfloat16, torch.float16):
        name = NAMES[dtype]
        with checks.case(name), torch.no_grad():
            model = subject.model(dtype)
            exact = subject.forward(subject.model(dtype).double(), ids).logits
            plain = _error(_plain_logits(subject, model, ids), exact)
            runs = {"whole": (131,)} | PIECES
            for way, sizes in runs.items():
                logits, cache = subject.run(model, ids, cut(131, sizes))
                ratio = _error(logits, exact) / max(plain, torch.finfo(dtype).tiny)
                checks.below(f"{way}: error / plain error", ratio, 2)
            _state_dtypes(checks, cache)
        with checks.case(f"{name}, autocast"), torch.no_grad():
            model = subject.model(torch.float32)
            exact = subject.forward(subject.model(torch.float64), ids).logits
            with torch.autocast("cpu", dtype):
                plain = _error(_plain_logits(subject, model, ids), exact)
                logits, cache = subject.run(model, ids, cut(131, (7, 64, 1, 59)))
            checks.below("error / plain error", _error(logits, exact) / plain, 2)
            _state_dtypes(checks, cache)
        with checks.case(f"{name}, extremes"), torch.no_grad():
            _extremes(subject, checks, dtype)
    with checks.case("bf16"), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        subject.model(torch.float32).save_pretrained(folder)
        model = subject.model(torch.float32).to(torch.bfloat16)
        loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
        same = torch.equal(subject.forward(model, ids).logits, subject.forward(loaded, ids).logits)
        checks.holds("moved = loaded as bf16, bit for bit", same)
    if not torch.cuda.is_available():
        checks.not_run("16 bits on a GPU", "no GPU")


def _error(logits, exact):
    return (logits.double() - exact).abs().mean().item()


def _plain_logits(subject, model, ids):
    with plain_operators(model) as replaced:
        if replaced:
            return subject.forward(model, ids).logits
    return subject.run(model, ids, cut(ids.shape[1], (1,)))[0]


@contextlib.contextmanager
def plain_operators(model):
    """Replaces the zoo's operators by their definitions in the modules a model is made of.

    Yields the names of what was replaced.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
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


def _state_dtypes(checks, cache):
    """Accumulators are float32; what a state merely remembers may have the model's dtype."""
    layers = getattr(cache, "layers", ())
    if not any(hasattr(layer, "tensors") for layer in layers):
        checks.not_run("state in float32", "its cache does not say what is an accumulator")
        return
    rounded = sorted(
        path
        for path, x in cache_tensors(cache).items()
        if ".tensors.memory" in path and x.dtype not in (torch.float32, torch.float64)
    )
    checks.below("accumulators below float32", len(rounded), 0)


def _extremes(subject, checks, dtype):
    ids = subject.ids(1, 4200)
    for name, factor in {"4200 tokens": 1, "4200 tokens, weights x 8": 8}.items():
        model = subject.model(torch.float32)
        for weight in model.parameters():
            weight *= factor
        model = model.to(dtype)
        for way, sizes in {"whole": (4200,), "in pieces of 1000": (1000,)}.items():
            logits, cache = subject.run(model, ids, cut(4200, sizes))
            tensors = [logits, *cache_tensors(cache).values()]
            bad = sum((~torch.isfinite(x)).sum().item() for x in tensors if x.is_floating_point())
            checks.below(f"{name}, {way}: NaN or infinite", bad, 0)


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
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        checks.below(
            "|loss - log(vocab)|, nats", abs(loss - math.log(subject.vocab_size)), LOSS_BOUND
        )
    with checks.case("initialisation of the paper"):
        if subject.initialization is None:
            raise NotApplicable("no table of expected statistics was given")
        _statistics(subject, checks, fresh)


def _statistics(subject, checks, fresh):
    table = subject.initialization
    for name, weight in fresh.named_parameters():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in table):
            checks.holds(name, False, "no entry", "an entry")
    for pattern, (mean, std, distribution) in table.items():
        weights = [x for name, x in fresh.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not weights:
            checks.holds(pattern, False, "no parameter", "a parameter")
            continue
        x = torch.cat([weight.detach().flatten() for weight in weights]).double()
        if distribution == "constant":
            checks.below(f"{pattern}: distance from {mean:g}", (x - mean).abs().max().item(), 0)
            continue
        error = std / len(x) ** 0.5
        off = abs(x.mean().item() - mean) / error
        checks.below(f"{pattern}: mean {mean:g}, off by standard errors", off, STANDARD_ERRORS)
        # The variance of a sample variance follows from the kurtosis: 3 if normal, 9/5 if uniform.
        kurtosis = {"normal": 3.0, "uniform": 1.8}[distribution]
        error = std * ((kurtosis - 1) / (4 * len(x))) ** 0.5
        off = abs(x.std().item() - std) / error
        checks.below(f"{pattern}: std {std:.4g}, off by standard errors", off, STANDARD_ERRORS)
        measured = ((x - x.mean()) / x.std()).pow(4).mean().item()
        # 24 / n is the variance of a normal sample's kurtosis; a uniform one's is smaller.
        off = abs(measured - kurtosis) / (24 / len(x)) ** 0.5
        checks.below(f"{pattern}: {distribution}, kurtosis off by standard errors", off, 6)
