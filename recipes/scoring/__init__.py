"""What `recipes/evaluate.py` is made of."""
