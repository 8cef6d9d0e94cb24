"""Rows as a run would leave them, made from a seed: every part of a report has something to show."""

from __future__ import annotations

import random
from typing import Any

from kvpolicy.statistics.rows import Evidence, Row

WORDS = "the cache holds keys and values of every token that was seen so far and reads them at each step".split()  # noqa: SIM905
ARMS = {
    "exact": (16.0, 0.0),
    "exact again": (16.0, 0.0),
    "kivi:nbits=2": (3.1, 0.06),
    "logquant:window=42": (2.9, 0.04),
    "balanced": (4.6, 0.0),
    "streaming-llm <b>&": (1.2, 0.6),
}
TASKS = ("lines", "needle|multi", "a_rather_long_name_of_a_task_from_files")


def evidence(n: int = 40, seed: int = 0, arms: dict[str, tuple[float, float]] = ARMS) -> Evidence:
    """A run of `n` samples a task, the last arm cut short and failing once."""
    rng = random.Random(seed)
    rows = []
    for task in TASKS:
        for sample in range(n):
            text = " ".join(rng.choice(WORDS) for _ in range(30))
            base = float(rng.random() < 0.8)
            facts = {"depth": (sample % 5) / 5 + 0.1, "length": 1024 * 2 ** (sample % 3), "prompt_tokens": 900}
            for place, (arm, (bits, harm)) in enumerate(arms.items()):
                if arm.startswith("streaming") and sample >= n * 3 // 4:
                    continue
                rows.append(_row(rng, arm, task, sample, text, base, bits, harm, facts, place))
    return Evidence(
        tuple(rows),
        {arm: "tiers:\n- {keys: full}\n" if arm.startswith("exact") else f"name: {arm!r}\n" for arm in arms},
        "exact",
        dict.fromkeys(TASKS, n),
        {
            "model": "small <script>alert(1)</script>",
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
            "command": "kvpolicy compare kivi:nbits=2 logquant:window=42 --task lines",
            "attention": attention(),
        },
    )


def _row(
    rng: random.Random, arm: str, task: str, sample: int, text: str, base: float, bits: float, harm: float,
    facts: dict[str, Any], place: int,
) -> Row:  # fmt: skip
    if arm.startswith("streaming") and sample == 3:
        return Row(arm, task, str(sample), error="CUDA out of memory\ntraceback", facts=facts, prompt=f"? {text}")
    hurt = rng.random() < harm
    words = text.split()
    cut = rng.randrange(1, 25)
    output = " ".join(words[:cut] + ["again and"] * 30) if hurt else text
    kl = [harm * (1 + 0.1 * i) * rng.random() + 1e-5 * place for i in range(12)]
    return Row(
        arm,
        task,
        str(sample),
        {
            "score": 0.0 if hurt else base,
            "kl": sum(kl) / len(kl),
            "nll": 0.2 + sum(kl) / len(kl),
            "bits": bits + 0.01 * rng.random(),
            "peak_bytes": bits * 1e5,
            "final_bytes": bits * 9e4,
            "exact_bytes": 16e5,
            "prefill_seconds": 0.2 + 0.02 * rng.random(),
            "step_seconds": 0.01 + 0.002 * place,
        },
        document=f"d{sample // 2}" if task == TASKS[2] else None,
        facts={
            **facts,
            "kl_steps": kl,
            "first_divergence": cut if hurt else None,
            "memory": {"codes": bits * 5e4, "scales": bits * 1e4, "exact": 3e4, "indices": 2e3},
        },
        prompt=f"<k> & \u2028 </script><img src=//x> {text} " * 20,
        answer=text[:40],
        output=output,
    )


def attention(layers: int = 6) -> dict[str, Any]:
    """As `Distances.to_dict` gives it."""
    x = [1.0 * 2**i for i in range(11)]
    curves = {str(layer): [0.2 / d ** (0.8 + 0.08 * layer) for d in x] for layer in range(layers)}
    fit = {"alpha": 1.0, "factor": 0.2, "r2": 0.98, "first": 8.0, "last": 1024.0}
    return {
        "distances": x,
        "mean": [sum(curve[i] for curve in curves.values()) / layers for i in range(len(x))],
        "layers": curves,
        "fit": fit,
        "fit_layers": {layer: {**fit, "alpha": 0.8 + 0.08 * int(layer)} for layer in curves},
        "first_tokens": 0.31,
        "own_token": 0.07,
    }
