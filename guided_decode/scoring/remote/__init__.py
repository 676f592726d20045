"""A scorer in another process: the wire that both sides speak.

pyzmq and msgspec come with the extra `remote`; `address` and `libraries` do without them.
"""
