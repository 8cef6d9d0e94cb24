"""Recipes as models of lm-evaluation-harness: `register` makes the model class `kvpolicy` known to it."""

from __future__ import annotations

NAME = "kvpolicy"


def register() -> None:
    """Make `--model kvpolicy` known to lm-evaluation-harness, in this process.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed, or too old.
    """
    from kvpolicy.arguments import check_lm_eval

    check_lm_eval()
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="kvpolicy.harness.model:CompressedLM")
