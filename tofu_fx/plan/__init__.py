"""What the user asks for (options, a plan), and what that comes to at each site: how many tokens go, and how."""
