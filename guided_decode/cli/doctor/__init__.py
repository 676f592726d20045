"""What `guided-decode doctor` looks at. Nothing here imports a library that may be broken, but the
functions that a process of their own runs."""
