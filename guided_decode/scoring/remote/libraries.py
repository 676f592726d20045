"""The libraries of a scorer server and its clients, which come with an extra."""

from importlib.util import find_spec

EXTRA = "remote"
_NEEDED = {"zmq": "pyzmq", "msgspec": "msgspec"}


def require_libraries(**more: str) -> None:
    """Raises ImportError: a library of the extra is missing; names the line that brings it.

    more: further modules, each with the name of its distribution.
    """
    wanted = {**_NEEDED, **more}
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"a scorer server needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'guided-decode[{EXTRA}]'"
        )
