"""`python -m guided_decode.cli`, for where the script is not on the path."""

from guided_decode.cli import main

main()
