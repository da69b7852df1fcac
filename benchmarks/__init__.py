"""Benchmarks of the published procedure and ours. ``make bench`` prints the table."""
