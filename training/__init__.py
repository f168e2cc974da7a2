"""A training run: what it needs, how it starts, what it writes."""
