"""The page: one HTML file that has all it needs, and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files

from guided_decode.lab.trace.data import as_data
from guided_decode.lab.trace.record import Trace

_SCRIPTS = ("text.js", "curve.js", "table.js", "tree.js", "page.js")
# Inside a script element these would be markup; in JSON they stand in strings alone.
_MARKUP = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(trace: Trace) -> str:
    """The trace as an HTML page: equal traces give equal text, in ASCII.

    Text of models and prompts comes in JSON alone, which no browser runs, and is put on the page
    as text. The page's own script and style are known by their hashes; nothing else may run, be
    loaded or be sent.
    """
    script = "(() => {\n" + "\n".join(_resource(name) for name in _SCRIPTS) + "})();\n"
    style = _resource("page.css")
    parts = {
        "POLICY": _policy(script, style),
        "STYLE": style,
        "DATA": _escaped(as_data(trace)),
        "SCRIPT": script,
    }
    text = _resource("page.html")
    for name, part in parts.items():
        # Once: what is put in may spell another part's name.
        before, after = text.split(f"{{{{{name}}}}}")
        parts[name] = before + part
        text = after
    return "".join(parts.values()) + text


def _escaped(data: object) -> str:
    """JSON that is safe between tags."""
    # ASCII: half a character has no UTF-8.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, code in _MARKUP.items():
        text = text.replace(character, code)
    return text


def _policy(script: str, style: str) -> str:
    """What the browser may do: run this script and use this style."""
    rules = ("default-src 'none'", f"script-src '{_digest(script)}'",
             f"style-src '{_digest(style)}'", "base-uri 'none'", "form-action 'none'")  # fmt: skip
    return "; ".join(rules)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    text = files("guided_decode.lab.trace").joinpath("web", name).read_text("ascii")
    # As a browser reads it, and as it is hashed.
    return text.replace("\r\n", "\n")
