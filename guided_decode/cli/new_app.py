"""A `guided-decode` application without commands."""

import typer

from guided_decode.cli.errors import OneLineErrors


def new_app() -> typer.Typer:
    """An application whose commands fail as all of ours do."""
    return typer.Typer(
        cls=OneLineErrors,
        help="Value-guided decoding: put the PPO critic to work at decoding time.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
