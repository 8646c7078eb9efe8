"""How each op carries axes: one rule an entry, in files by family of ops; the table of all is in table.py."""
