"""In and out of the Hub: convert foreign checkpoints, export ours, write the card, push."""
