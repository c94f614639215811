"""What is kept of each block: parameters, optimizer states, gradients and activations."""
