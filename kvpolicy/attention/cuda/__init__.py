"""Attention on compressed stores in one launch, on NVIDIA GPUs: see README.md in this folder."""
