"""The only rooms through which bytes move between tiers."""
