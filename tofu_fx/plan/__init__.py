"""What the user asks for (options, a plan), and what that comes to at each site of a graph: how many tokens go, and how."""
