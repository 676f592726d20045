"""Where the examples find their models: on the Hub, or under $MODELS on this machine."""

import os


def model(name: str) -> str:
    """A Hub id, or with $MODELS the folder there that is called as it is without its owner.

    It keeps its name, by which the registry knows how it is read.
    """
    folder = os.environ.get("MODELS")
    return name if not folder else os.path.join(folder, name.rpartition("/")[2])
