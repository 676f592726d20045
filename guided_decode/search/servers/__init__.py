"""Policies on servers that speak OpenAI's completions over HTTP: vLLM's, and others that are exact.

`connect_generator` asks each server what it can do and refuses what would be less than exact. The
calls are those of `guided_decode.search.http`.
"""

from guided_decode.search.servers.completions import Inexact
from guided_decode.search.servers.generator import ServerGenerator, connect_generator

__all__ = ["Inexact", "ServerGenerator", "connect_generator"]
