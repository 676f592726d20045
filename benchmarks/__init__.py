"""Figures: each module checks its results first, then times them in one run, and writes a table."""
