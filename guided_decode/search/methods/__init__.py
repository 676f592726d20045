"""Search methods, one a file: Python generators of requests (see `search.result.Search`)."""
