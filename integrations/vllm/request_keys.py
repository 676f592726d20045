"""The keys of a request in `vllm_xargs`: their names, types, ranges, and what goes together."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from guided_decode.guidance.config import Rule, Tail
from guided_decode.integrations.vllm.server_config import sentence, unknown_keys

# The keys that change a setting of GuidanceConfig; each of them asks for guidance.
_SETTINGS = (
    "beta", "top_k", "top_p", "rule", "margin", "tail", "gate", "value_gate", "value_gate_fall",
)  # fmt: skip
_GROUP = ("group", "group_size", "keep", "every")
# True and false are as good as 1 and 0.
_Flag = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, bool) else v)]


class Keys(BaseModel):
    """The keys of `vllm_xargs` that begin with `guide`, without that prefix; types and ranges.

    guide: 1 asks for guidance, 0 refuses it.
    beta, top_k, top_p, rule, margin, tail, gate, value_gate, value_gate_fall: as in
        `GuidanceConfig`; each asks for guidance.
    abstain, abstain_after: as there; by themselves they guide nothing.
    group: an unguessable value that the samples of one prompt share; these are then compared.
    group_size, keep, every: how many siblings there are, how many survive, and after how many
        tokens they are compared, again and again.
    values: 1 asks for V before each token of the response, and for the token's advantage.
    values_id: an unguessable name under which these wait in the worker; whoever fetches them there
        chooses it.
    prune_token: which of stop_token_ids ends a pruned sibling, or a response that abstains; needed
        where there are several.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    guide: _Flag | None = Field(default=None, ge=0, le=1)
    beta: FiniteFloat | None = Field(default=None, alias="guide_beta")
    top_k: int | None = Field(default=None, ge=1, alias="guide_top_k")
    top_p: FiniteFloat | None = Field(default=None, gt=0, le=1, alias="guide_top_p")
    rule: Rule | None = Field(default=None, alias="guide_rule")
    margin: FiniteFloat | None = Field(default=None, ge=0, alias="guide_margin")
    tail: Tail | None = Field(default=None, alias="guide_tail")
    gate: FiniteFloat | None = Field(default=None, gt=0, le=1, alias="guide_gate")
    value_gate: FiniteFloat | None = Field(default=None, alias="guide_value_gate")
    value_gate_fall: FiniteFloat | None = Field(default=None, ge=0, alias="guide_value_gate_fall")
    abstain: FiniteFloat | None = Field(default=None, alias="guide_abstain")
    abstain_after: int | None = Field(default=None, ge=1, alias="guide_abstain_after")
    group: str | None = Field(default=None, min_length=8, max_length=128, alias="guide_group")
    group_size: int | None = Field(default=None, ge=2, alias="guide_group_size")
    keep: int | None = Field(default=None, ge=1, alias="guide_keep")
    every: int | None = Field(default=None, ge=1, alias="guide_every")
    prune_token: int | None = Field(default=None, ge=0, alias="guide_prune_token")
    values: _Flag | None = Field(default=None, ge=0, le=1, alias="guide_values")
    values_id: str | None = Field(
        default=None, min_length=16, max_length=64, alias="guide_values_id"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of GuidanceConfig that the request names."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def abstention(self) -> dict[str, Any]:
        """What the request says of abstention, as fields of GuidanceConfig; nothing: empty."""
        if self.abstain is None:
            return {}
        return {"abstain": self.abstain, "abstain_after": self.abstain_after}

    @property
    def needs_values(self) -> str | None:
        """The first key that reads values of prefixes, or None."""
        names = ("group", "abstain", "value_gate", "value_gate_fall")
        asked = [name for name in names if getattr(self, name) is not None]
        asked += ["values"] if self.values else []
        return f"guide_{asked[0]}" if asked else None


_KNOWN = tuple(field.alias or name for name, field in Keys.model_fields.items())


def is_own_key(name: str) -> bool:
    """Whether a key of `vllm_xargs` is ours."""
    return name == "guide" or name.startswith("guide_")


def keys_of(extra_args: Mapping[str, Any] | None) -> Keys | None:
    """The request's own keys; None where it has none.

    Raises ValueError: a key that nobody knows, or a wrong value.
    """
    given = {name: value for name, value in (extra_args or {}).items() if is_own_key(name)}
    if not given:
        return None
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        # Before anything looks at each of them: there may be a million.
        raise ValueError(unknown_keys(unknown, _KNOWN))
    try:
        return Keys.model_validate(given)
    except ValidationError as error:
        raise ValueError(sentence(error, _KNOWN)) from None


def check_combination(keys: Keys) -> None:
    """Raises ValueError: keys that do not go together."""
    if keys.guide is not None and not keys.guide and keys.settings:
        raise ValueError(
            f"guide=0 was given together with guide_{next(iter(keys.settings))}: expected guide=1, "
            "or no settings"
        )
    stray = [f"guide_{name}" for name in _GROUP[1:] if getattr(keys, name) is not None]
    if keys.group is None and stray:
        raise ValueError(f"{', '.join(stray)} came without guide_group: pass both, or neither")
    if keys.prune_token is not None and keys.group is None and keys.abstain is None:
        raise ValueError(
            "guide_prune_token came without guide_group or guide_abstain: pass both, or neither"
        )
    if keys.abstain_after is not None and keys.abstain is None:
        raise ValueError("guide_abstain_after came without guide_abstain: pass both, or neither")
    if keys.values_id is not None and not keys.values:
        raise ValueError("guide_values_id came without guide_values=1: pass both, or neither")
    if keys.values and keys.values_id is None:
        raise ValueError(
            "guide_values=1 came, but nothing here puts values into responses: over HTTP start the "
            "server by guided-decode serve, or with the --middleware and --worker-extension-cls of "
            "docs/vllm.md, and ask /v1/chat/completions or /v1/completions; in process pass "
            "guide_values_id, too, and call take_values"
        )
    if keys.rule == "reweight" and keys.margin is not None:
        raise ValueError(
            f"guide_margin={keys.margin:g} was given with guide_rule='reweight', which has no "
            "margin: drop it, or pass guide_rule='prune'"
        )
