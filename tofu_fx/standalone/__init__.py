"""Rewritten graphs that stand on their own, without torch.compile: as modules."""
