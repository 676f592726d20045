"""The command line, `guided-decode`: one command a file."""

import sys


def main() -> None:
    """The entry point of the `guided-decode` script."""
    from guided_decode.cli.quiet import quieten_libraries

    quieten_libraries()
    if sys.argv[1:2] == ["doctor"]:
        # It looks for libraries that cannot be imported: the other commands import them.
        from guided_decode.cli.doctor.alone import app
    else:
        from guided_decode.cli.app import app

    app(prog_name="guided-decode")
