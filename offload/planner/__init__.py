"""Arithmetic that decides what lives where. Imports no torch."""
