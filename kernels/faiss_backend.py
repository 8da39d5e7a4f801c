"""The keys that a large memory's queries choose, found by an index of faiss in a decoding step.

https://github.com/facebookresearch/faiss (Douze et al. 2024, https://arxiv.org/abs/2401.08281).
Exact search looks at every key of a memory in every step. An index looks at some of them:

    search_with_faiss(model, "HNSW32")      # or "IVF1024,Flat", or "Flat", which is exact
    model.generate(...)
    print(recall_of(model))                 # if it was asked to measure it

How to run, not part of a model: the config knows nothing of it. An index only proposes keys. Their
scores and values are those of the state, whatever an index holds, so that what it misses is all
that it can do wrong: that is its recall, the share of the exact choice that it finds. Passes of
several tokens search exactly, and so do steps over a memory below `least`.

An index is of one row's keys of one head, and grows with them: whole segments are added when a
query first sees them. It belongs to whatever text comes next. Whether that goes on from what the
index holds is seen by samples of keys, and where it does not, another index is built.
"""

import importlib

import torch

# Keys that an index is compared with its text by, of those it holds.
SAMPLES = 16
# Of the largest score: two that are closer are equal to faiss, which computes in float32.
ROUNDING = 1e-5


def search_with_faiss(model, index="HNSW32", least=4096, device="cpu", measures_recall=False):
    """Lets the memory layers of a model find the keys of a decoding step by indices of faiss.

    Args:
        model: with layers that choose the keys of a memory of all earlier segments
            (memory_top_k of a LongLlama model, without memory_windows).
        index: what faiss.index_factory calls it; None: exact search again.
        least: tokens of a memory from which on there is an index.
        device: "cpu", or "cuda", which needs a faiss that is built for it (faiss-gpu-cu12).
        measures_recall: search exactly too, in every step, for `recall_of`.

    Raises:
        ValueError: no such layer, no faiss, an index or a device that it does not know.
    """
    layers = [x for x in model.modules() if hasattr(x, "index") and hasattr(x, "top_k")]
    layers = [x for x in layers if x.top_k is not None and x.windows is None]
    if not layers:
        raise ValueError(
            f"faiss finds the keys that memory_top_k chooses of a memory without memory_windows, "
            f"got a {type(model).__name__} without such a layer."
        )
    if index is not None:
        make = factory(index, layers[0].head_dim, device)
        make()  # what faiss does not know it says now, not in the middle of a text
    for layer in layers:
        layer.index = None
        if index is not None:
            layer.index = MemoryIndex(make, least, measures_recall)


def recall_of(model):
    """The share of the keys that exact search chose and the indices of a model found too.

    Raises:
        ValueError: nothing was measured.
    """
    indices = [getattr(x, "index", None) for x in model.modules()]
    indices = [x for x in indices if isinstance(x, MemoryIndex) and x.wanted]
    if not indices:
        raise ValueError(
            "no recall was measured; call search_with_faiss(model, ..., measures_recall=True), and "
            "decode with a memory of at least `least` tokens."
        )
    return sum(x.found for x in indices) / sum(x.wanted for x in indices)


def factory(name, size, device):
    """A function that makes an empty index of vectors of a size, by their products.

    Raises:
        ValueError: faiss is missing, or has no such index or device.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        raise ValueError(
            "faiss is not installed: `pip install longzoo[faiss]`, or search exactly."
        ) from None
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is 'cpu' or 'cuda', got {device!r}.")
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise ValueError(
            "this faiss is built for processors alone: `pip install faiss-gpu-cu12` in the place "
            "of faiss-cpu, or device='cpu'."
        )
    resources = faiss.StandardGpuResources() if device == "cuda" else None

    def make():
        try:
            index = faiss.index_factory(size, name, faiss.METRIC_INNER_PRODUCT)
            return index if resources is None else faiss.index_cpu_to_gpu(resources, 0, index)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"faiss makes no index {name!r} on {device}: {last}") from None

    return make


class MemoryIndex:
    """The indices of one layer: of each row and head of keys one.

    Args:
        make: makes an empty one.
        least: tokens of a memory from which on there is one.
        measures_recall: whether to search exactly too.

    Attributes:
        wanted, found: keys that exact search chose, and those of them that were found.
        built: how many indices were begun.
    """

    def __init__(self, make, least, measures_recall=False):
        self.make, self.least, self.measures_recall = make, least, measures_recall
        self.wanted = self.found = self.built = 0
        self.indices = {}

    def __deepcopy__(self, memo):
        return MemoryIndex(self.make, self.least, self.measures_recall)

    def __reduce__(self):
        raise ValueError(
            "an index of faiss is not saved with a model; call search_with_faiss(model, None) "
            "before, and search_with_faiss again on what was loaded."
        )

    @torch.no_grad()
    def find(self, mixer, q_BTHK, keys_BSGK, begin_B):
        """Where the chosen keys of a step are, [B, H, top_k]; -1 where there are no more.

        Args:
            mixer: the layer, whose `search` is exact.
            q_BTHK: a query per row.
            keys_BSGK: the state.
            begin_B: of each row how many of its keys, the first, are its memory.
        """
        slots_S, begins = torch.arange(keys_BSGK.shape[1], device=q_BTHK.device), begin_B.tolist()
        place_BHk = q_BTHK.new_full((*q_BTHK.shape[:1], q_BTHK.shape[2], mixer.top_k), -1).long()
        exact = [row for row, begin in enumerate(begins) if begin < self.least]
        by_index = [row for row, begin in enumerate(begins) if begin >= self.least]

        def search(rows):
            seen = slots_S < begin_B[rows, None]
            return mixer.search(q_BTHK[rows], keys_BSGK[rows], seen)

        if exact:
            place_BHk[exact] = search(exact)
        per_group = q_BTHK.shape[2] // keys_BSGK.shape[2]
        for row in by_index:
            for group in range(keys_BSGK.shape[2]):
                heads = slice(group * per_group, (group + 1) * per_group)
                keys_SK = keys_BSGK[row, : begins[row], group].detach()
                index = self.index_of((row, group), keys_SK)
                q_HK = q_BTHK[row, 0, heads].float().cpu().contiguous().numpy()
                found = index.search(q_HK, min(mixer.top_k, begins[row]))[1]
                place_BHk[row, heads, : found.shape[1]] = torch.from_numpy(found).to(q_BTHK.device)
        if self.measures_recall and by_index:
            self.measure(
                q_BTHK[by_index], keys_BSGK[by_index], search(by_index), place_BHk[by_index]
            )
        return place_BHk

    def measure(self, q_BTHK, keys_BSGK, exact_BHk, place_BHk):
        """Counts the keys that are as good as those of exact search, in faiss's 32 bits."""
        per_group = q_BTHK.shape[2] // keys_BSGK.shape[2]
        rows_B11 = torch.arange(len(q_BTHK), device=q_BTHK.device)[:, None, None]
        group_H1 = torch.arange(q_BTHK.shape[2], device=q_BTHK.device)[:, None] // per_group
        scores = []
        for where_BHk in (exact_BHk, place_BHk):
            k_BHkK = keys_BSGK[rows_B11, where_BHk.clamp(min=0), group_H1]
            score_BHk = torch.einsum("bthk,bhsk->bhs", q_BTHK, k_BHkK)
            scores.append(score_BHk.masked_fill(where_BHk < 0, torch.nan))
        worst_BH1 = scores[0].nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
        worst_BH1 = worst_BH1 - ROUNDING * scores[0].nan_to_num().abs().amax(-1, keepdim=True)
        self.wanted += (exact_BHk >= 0).sum().item()
        self.found += (scores[1] >= worst_BH1).sum().item()

    def index_of(self, name, keys_SK):
        """The index of a row and head that holds these keys."""
        index, sample = self.indices.get(name, (None, None))
        if index is not None and not self.goes_on(index, sample, keys_SK):
            index = None
        count = 0 if index is None else index.ntotal
        if count == len(keys_SK):
            return index
        new_SK = keys_SK[count:].float().cpu().contiguous().numpy()
        if index is None:
            index = self.make()
            self.built += 1
            if not index.is_trained:
                index.train(new_SK)
        index.add(new_SK)
        places = torch.linspace(0, len(keys_SK) - 1, SAMPLES, device=keys_SK.device).long()
        self.indices[name] = index, (places, keys_SK[places].clone())
        return index

    @staticmethod
    def goes_on(index, sample, keys_SK):
        """Whether what an index holds is the start of these keys, as far as samples say."""
        places, held = sample
        if index.ntotal > len(keys_SK):
            return False
        return held.device == keys_SK.device and torch.equal(keys_SK[places], held)
