"""`guided-decode ablate`: a grid of methods over prompts, from a file.

`schema` has the file's keys, `reading` reads it, `cells` makes settings of it and says what cannot
be, `rewards` judges, `models` answers, `run` works the units off, `report` writes what came of it.
"""
