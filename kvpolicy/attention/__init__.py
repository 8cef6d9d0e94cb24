"""Attention over stores: partial results and their merge, masks, and the reference in torch."""
