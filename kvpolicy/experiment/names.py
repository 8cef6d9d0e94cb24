"""Names in results: metrics, and arms that are always there."""

from __future__ import annotations

EXACT = "exact"
"""The arm that every other is compared with, unless another `baseline` is named: the exact cache."""
AGAIN = "exact again"
"""The A/A arm: the exact cache, run a second time in a batch of two."""
QUALITY = ("score", "nll", "kl", "top1")
COST = ("bits", "peak_bytes", "final_bytes", "exact_bytes", "prefill_seconds", "step_seconds")
ATTENTION = ("l1", "l2", "exact_mass", "quantized_mass", "dropped_mass")
METRICS = (*QUALITY, *COST, *ATTENTION)
"""What a row may hold, and `Comparison.mean` and `Comparison.difference` know."""
