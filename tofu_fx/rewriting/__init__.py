"""The graph written again, on fewer tokens."""
