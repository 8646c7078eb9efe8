"""Rows that nobody reads: which rows of each tensor are read, and how to compute these alone."""
