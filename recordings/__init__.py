"""Recordings and what is known of them: found, checked, read. Knows no flags and no model."""
