"""Creating an adapter: every B from the subspace solver, for a whole model at once."""
