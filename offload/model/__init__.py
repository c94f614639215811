"""Cutting a module into blocks, laying them out flat and running them in micro-batches."""
