"""`guided-decode ablate`: a grid of methods over prompts, from a file.

`schema` has the file's keys, `reading` reads it, `cells` makes cells of it, `pairs` says which of
them cannot be, `models` loads what `answers`, `rewards` judges, `run` works the units off, `report`
writes what came of it.
"""
