"""`python -m guided_decode`, which torchrun starts a process of for each GPU."""

from guided_decode.cli import main

main()
