"""Rows of experiments, and what follows from them."""
