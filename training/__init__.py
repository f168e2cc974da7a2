"""One training run: what it needs, how it starts, what it leaves."""
