"""Flags: read from the command line, checked before anything slow is imported."""
