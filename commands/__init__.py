"""The work of the scripts, once their flags are known."""
