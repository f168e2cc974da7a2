"""Flags, read from the command line and checked before anything slow is imported."""
