"""The planner's two inputs: what a model asks for (traced) and what a machine gives (probed)."""

SECONDS = 40.0
"""Time that measuring takes unless said otherwise; setting up takes a few seconds more."""
