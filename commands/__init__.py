"""What the scripts do once their flags are known."""
