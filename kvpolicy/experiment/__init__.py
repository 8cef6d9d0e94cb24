"""Comparisons of recipes on the same samples: runs, statistics, tables and pictures."""
