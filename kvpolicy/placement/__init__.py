"""Where tokens are, and where they go: integers and tables, no keys and values."""
