"""Stores: keys or values of one tier, packed, and their bytes."""
