"""The file of a cache: its header and checksum, its stores, and where its tokens are."""
