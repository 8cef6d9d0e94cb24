"""Samples to compare caches on, and how what a model writes is scored."""
