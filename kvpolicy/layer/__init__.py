"""One layer of a cache, apart from transformers: its stores, its views, its report, its file."""
