"""Recipes: YAML read, checked and built into tiers."""
