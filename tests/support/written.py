"""Recipes as a user would write them."""

from __future__ import annotations

__all__ = ["policy", "store", "tiers"]


def tiers(*lines: str) -> str:
    return "tiers:\n" + "".join(f"  - {line}\n" for line in lines)


def policy(text: str) -> str:
    return tiers(f"{{policy: {text}, store: full}}", "{store: evict}")


def store(text: str) -> str:
    return tiers(f"{{store: {text}}}")
