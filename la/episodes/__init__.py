"""Episodes: how they are drawn, packed into tensors and told by protocols (paper sections 3, 4.4 and 5.1)."""
