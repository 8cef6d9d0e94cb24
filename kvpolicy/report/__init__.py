"""Reports of experiments: pages, tables, and rows that come from elsewhere."""
