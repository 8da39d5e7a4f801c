"""What extrapolate.py is made of."""
