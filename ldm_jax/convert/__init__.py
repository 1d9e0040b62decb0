"""Translation between the weights of other code bases and ours: pure functions on NumPy arrays."""
