"""Caches and attached models of transformers. The only room that knows transformers."""
