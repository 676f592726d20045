"""The application with `doctor` as its only command: it imports no library that may be broken."""

from guided_decode.cli.doctor.command import doctor
from guided_decode.cli.new_app import new_app

app = new_app()
app.command()(doctor)


@app.callback()
def _as_a_group() -> None:
    """With one command alone typer would take its name for an argument."""
