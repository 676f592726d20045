"""Ablations: a grid of decoding methods over prompts, kept unit by unit, and what they amount to.

`grid` has the cells and their units, `store` keeps finished units, `runner` works them off,
`decoding` decodes single-token methods, `outcomes` and `summary` count, `tables` and `plots` show.
"""
