"""The order in which blocks are used, as data. Imports no torch."""
