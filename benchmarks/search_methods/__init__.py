"""Every decoding method on tiny-tulu at equal total tokens: `python -m benchmarks.search_methods`.

`settings` has what is tried, `decoding` runs it, `records` keeps what was run, `choice` takes the
settings of each budget from the validation prompts, `table` compares them on the held-out ones.
"""
