"""The planner's two inputs: what a model asks for (traced) and what a machine gives (probed)."""
