"""What `recipes/pretrain.py` is made of."""
