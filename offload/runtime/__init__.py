"""The executor: moves blocks while autograd runs."""
