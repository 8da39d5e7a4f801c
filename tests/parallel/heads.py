"""One of four processes that have some of the heads of full attention each: as slices.py.

python tests/parallel/heads.py RANK SIZE STORE OUT
"""

from as_process import run_as_process
from slices import compare, write

from zoo.contract.subject import with_all_parts_active, zoo_subject

# Fields beside as many heads of keys as there are processes, and no window. Named what one has to
# do with by head.
MODELS = {
    "turned": {"num_attention_heads": 8, "head_dim": 6},
    "by distance": {"position_embedding_type": "t5", "learnable_sinks": True},
    "by query": {"position_embedding_type": "fire", "fire_init_length": 30},
    "by channel": {"position_embedding_type": ["xpos", None], "num_hidden_layers": 2},
}


def main(rank, size, out):
    """Compares all of them."""
    for name, fields in MODELS.items():
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        fields = {"sliding_window": None, **heads, **fields}
        subject = zoo_subject("sliding_window", **fields)
        model = with_all_parts_active(subject.build(0)).double().train()
        for case, found in compare(name, model, rank, size):
            write(out, name, case, size, found)


if __name__ == "__main__":
    run_as_process(main)
