"""Addresses of scorer servers: tcp://HOST:PORT and ipc://PATH."""

import ipaddress
from typing import Any

TCP, IPC = "tcp://", "ipc://"
DEFAULT = "tcp://127.0.0.1:7070"
_ANY = ("*", "0.0.0.0", "[::]")
_EXPECTED = "expected tcp://HOST:PORT or ipc://PATH, such as " + DEFAULT


def is_address(model: Any) -> bool:
    """Whether a scorer is named by where its server listens."""
    return isinstance(model, str) and model.startswith((TCP, IPC))


def check_address(address: str, *, connects: bool) -> None:
    """Raises ValueError: it is no address, or none that a client can connect to."""
    if address.startswith(IPC) and len(address) > len(IPC):
        return
    host, colon, port = address.removeprefix(TCP).rpartition(":")
    first = 1 if connects else 0
    if not (address.startswith(TCP) and colon and host and port.isascii() and port.isdigit()):
        raise ValueError(f"{address!r} is no address of a scorer server: {_EXPECTED}")
    if not first <= int(port) <= 65535:
        raise ValueError(f"{address!r} has port {port}: expected {first} to 65535")
    if connects and host in _ANY:
        raise ValueError(
            f"{address!r} is every address of a machine: expected one of them, the server's host"
        )


def is_local(address: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if address.startswith(IPC):
        return True
    host = address.removeprefix(TCP).rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_ipv6(address: str) -> bool:
    """Whether the host is written as an IPv6 address."""
    return address.startswith(TCP + "[")
