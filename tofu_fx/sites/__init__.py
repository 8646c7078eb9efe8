"""Which attentions a graph has, and where the tokens of each may go."""
