"""A block as one autograd function: it runs again in backward, as it ran in forward, and only what nobody has kept."""
