"""Attention on compressed stores in one launch, on NVIDIA GPUs: see README.md in this folder."""

from __future__ import annotations

from kvpolicy.cuda.launch import attend, refuses

__all__ = ["attend", "refuses"]
