"""The command line, `guided-decode`: one command a file."""


def main() -> None:
    """The entry point of the `guided-decode` script."""
    from guided_decode.cli.quiet import quieten_libraries

    quieten_libraries()
    from guided_decode.cli.app import app

    app(prog_name="guided-decode")
