"""How any model runs: config, decoder and loss, padding and packing, states, windows, replay."""
