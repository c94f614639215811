"""Updates made on a device with memory of its own, with the bits of the extension's kernels (`csrc/optim`)."""
