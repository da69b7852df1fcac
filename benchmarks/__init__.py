"""The published procedure beside ours. ``make bench`` prints the table."""
