"""What was observed: one row for each arm and sample, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Row:
    """What an arm did on a sample, or why it could not."""

    arm: str
    task: str
    sample: str
    """Names the sample within its task; the rows of one sample in several arms are a pair."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Finite numbers by name: `score` in [0, 1], `kl` and `nll` in nats a token, `bits`, bytes, seconds. A metric that
    a sample does not have is absent."""
    document: str | None = None
    """Samples that share a document are not independent; None: the sample stands for itself."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values about the sample or the run: `prompt_tokens`, `depth`, lists by step or by layer."""
    prompt: str | None = None
    answer: str | None = None
    """What was asked for."""
    output: str | None = None
    """What the model wrote."""
    error: str | None = None
    """Why the arm failed on this sample; such a row has no metrics."""


@dataclass(frozen=True)
class Evidence:
    """The rows of one or more runs, and what is needed to run them again."""

    rows: tuple[Row, ...]
    arms: Mapping[str, str | None]
    """Arms in the order given, each with its resolved recipe as YAML; None where rows came from elsewhere."""
    baseline: str
    """The arm that the others are compared with; `exact` in runs of kvpolicy."""
    planned: Mapping[str, int] = field(default_factory=dict)
    """How many samples each task was to have; more than there are rows: the run is partial."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the rows were made: model, dtype, device, versions, seeds, digests, template, truncation, command."""

    def to_pandas(self) -> pd.DataFrame:
        """A line for each row: arm, task, sample, document, error, then each metric, fact and text in its column."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "arm": row.arm,
                    "task": row.task,
                    "sample": row.sample,
                    "document": row.document,
                    "error": row.error,
                    **row.metrics,
                    **{name: value for name, value in row.facts.items() if name not in row.metrics},
                    "prompt": row.prompt,
                    "answer": row.answer,
                    "output": row.output,
                }
                for row in self.rows
            ]
        )
