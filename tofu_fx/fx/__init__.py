"""Graph plumbing: nodes, ops, fake values, and how an ATen graph is recorded. It knows nothing of tokens."""
