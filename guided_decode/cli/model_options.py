"""The options that name models and say how they are read, shared by commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.cli.errors import Refusal

_PANEL = "Models"
_MOST_TOKENS = 2**31 - 1
_NAME = "folder, registered name or Hub id"


def _option(
    text: str, *names: str, metavar: str | None = None, min: int | None = None,
    max: int | None = None,
) -> Any:  # fmt: skip
    return typer.Option(
        *names, help=text, metavar=metavar, min=min, max=max, rich_help_panel=_PANEL
    )


Policy = Annotated[str | None, _option(f"{_NAME} \\[the scorer's, or tiny-tulu-sft]")]
Scorer = Annotated[
    str | None,
    _option(f"{_NAME}, or a scorer server's address \\[the policy's, or tiny-tulu-value]"),
]
SearchScorer = Annotated[
    str | None,
    _option(f"{_NAME}, a scorer server's address, or http://HOST:PORT of pooling servers, with "
            "commas \\[the policy's, or tiny-tulu-value]"),
]  # fmt: skip
Device = Annotated[str | None, _option("\\[a GPU if any]")]
ScorerDevice = Annotated[str | None, _option("\\[--device]")]
Dtype = Annotated[str, _option("of the weights", metavar="auto|float32|bfloat16|float16")]

# What `load_scorer` takes, by its names; None is what it does by itself.
Kind = Annotated[str | None, _option("the scorer's family \\[auto]")]
Head = Annotated[str | None, _option("a value head on hidden states of the policy (trunk-head)")]
Adapter = Annotated[
    str | None, _option("PEFT adapter: a folder or Hub id to put on the scorer, or one in its own")
]
Reward = Annotated[str | None, _option("reward model that scores responses that end")]
Reference = Annotated[str | None, _option("of an implicit reward's policy, or of a KL term")]
Revision = Annotated[str | None, _option("of the scorer's repository")]
Bos = Annotated[str | None, _option("one leading BOS \\[the family's]", metavar="keep|drop")]
Terminal = Annotated[
    str | None,
    _option("what a value at EOS means \\[the family's]", metavar="baseline|reward|critic"),
]
Transform = Annotated[
    str | None, _option("of the head's output: sigmoid, softmax:1, ... \\[the family's]")
]
Steps = Annotated[
    str | None,
    _option("how a process reward model's steps are marked \\[its own]",
            metavar="extra-0|newline|math-shepherd"),
]  # fmt: skip
Aggregate = Annotated[
    str | None,
    _option("its value of all steps' rewards \\[its authors']", metavar="last|min|product|mean"),
]
RopeTheta = Annotated[float | None, _option("in place of the scorer's config's")]
QUANTIZATIONS = "bnb-4bit|bnb-8bit|int8|int4|fp8"
Quantization = Annotated[
    str | None, _option("of the scorer's weights, not of its head", metavar=QUANTIZATIONS)
]
GgufFile = Annotated[str | None, _option("which file of the scorer's folder has its weights")]
DeviceMap = Annotated[
    str | None,
    _option("of the scorer over several devices, instead of a device",
            metavar='auto|balanced|{"MODULE": "DEVICE", ...}'),
]  # fmt: skip
AllowPickle = Annotated[
    bool, _option("read pickled weights where there are no others", "--allow-pickle")
]
TrustRemoteCode = Annotated[
    bool, _option("run code that comes with a checkpoint", "--trust-remote-code")
]
CacheTokens = Annotated[
    int | None, _option("tokens in the scorer's cache", min=1, max=_MOST_TOKENS)
]
ForwardTokens = Annotated[
    int | None, _option("tokens of one forward of the scorer", min=1, max=_MOST_TOKENS)
]
TpPlan = Annotated[
    str | None, _option("the scorer's weights, over the processes of torchrun", metavar="auto")
]


@dataclass(frozen=True, slots=True)
class ScorerOptions:
    """How a scorer is read: what `load_scorer` takes besides its name, device and dtype."""

    kind: Kind = None
    head: Head = None
    adapter: Adapter = None
    reward: Reward = None
    reference: Reference = None
    revision: Revision = None
    bos: Bos = None
    terminal: Terminal = None
    transform: Transform = None
    steps: Steps = None
    aggregate: Aggregate = None
    rope_theta: RopeTheta = None
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False
    cache_tokens: CacheTokens = None
    max_forward_tokens: ForwardTokens = None
    quantization: Quantization = None
    gguf_file: GgufFile = None
    device_map: DeviceMap = None
    tp_plan: TpPlan = None

    def given(self) -> dict[str, Any]:
        """What was given, by name, and is not what `load_scorer` does by itself."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own["kind"] = None if self.kind == "auto" else self.kind
        own["device_map"] = read_device_map(self.device_map)
        return {
            name: value for name, value in own.items() if value is not None and value is not False
        }


def read_device_map(given: str | None) -> Any:
    """A device map as it is typed: a word, or a JSON object of modules and devices."""
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise Refusal(
            f"--device-map {given}: {error}; expected a word such as auto, or a JSON object, "
            '{"MODULE": "DEVICE", ...}'
        ) from None
