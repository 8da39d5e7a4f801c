"""One architecture, one file: its paper's equations, config, mixer and classes."""
