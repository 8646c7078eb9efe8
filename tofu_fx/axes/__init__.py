"""What every dimension of every tensor is made of: atoms, and the rules by which each op carries them."""
