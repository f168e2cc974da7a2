"""Recordings and their captions: found, checked and read, independent of flags and models."""
