"""Which policy goes with which scorer and which method: what is refused before anything runs."""

from __future__ import annotations

from functools import cache
from typing import Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.ablate.schema import Model
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import location, parse_dtype
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal
from guided_decode.cli.judge_options import JudgeOptions, check_judging, pooling_urls
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement, refuse_unmet
from guided_decode.cli.search_plan import Plan
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.scoring.remote.address import is_address
from guided_decode.search.driver import SINGLE_TOKENS


def check_policy(policy: Model) -> None:
    """Raises Refusal: there is no such policy, or what is said of it does not go together."""
    location(policy.model)
    parse_dtype(policy.get("dtype", "auto"))
    engine = policy.group(EngineOptions)
    engine.check(policy.model, None)
    engine.arguments()
    if engine.on_servers or engine.on_vllm:
        engine.check_placement(policy.get("device"), policy.get("dtype", "auto"),
                               scorer_here=False)  # fmt: skip
    format_of(policy.get("prompt_format"), find(policy.model))


def check_scorer(scorer: Model) -> None:
    """Raises Refusal: there is no such scorer, or what is said of it does not go together."""
    reading, judging = scorer.group(ScorerOptions), scorer.group(JudgeOptions)
    if not on_a_server(scorer.model):
        location(scorer.model)
    check_judging(scorer.model, reading, judging)
    refuse_unmet(scorer.model, scorer.group(RemoteOptions))
    refuse_placement(scorer.model, device=scorer.get("device"))
    if reading.tp_plan is not None:
        raise Refusal("tp_plan came, and ablate runs in one process: serve the scorer with "
                      "guided-decode scorer, and give its address")  # fmt: skip
    for name in (reading.reward, reading.reference, reading.head):
        if name is not None and not on_a_server(name):
            _exists(name)
    _check_reading(scorer, reading)


def _check_reading(scorer: Model, reading: ScorerOptions) -> None:
    """Raises ValueError or Refusal: what needs no weights to be refused."""
    from guided_decode.checkpoints.families import find_family
    from guided_decode.scoring.transforms import parse_transform

    kind = reading.given().get("kind")
    if kind is not None and not on_a_server(scorer.model):
        find_family(kind)
    if reading.transform is not None:
        parse_transform(reading.transform)
    record = None if on_a_server(scorer.model) else find(scorer.model)
    known = None if record is None else record.reference
    if kind == "implicit" and reading.reference is None and known is None:
        raise Refusal("kind implicit needs reference, the model that the scorer was tuned from")


def check_searched(policy: Model, scorer: Model, plan: Plan) -> None:
    """Raises Refusal or ValueError: this scorer cannot judge this search of this policy."""
    if scorer.group(JudgeOptions).judge_through_text:
        if plan.method.per_token(plan.settings):
            raise Refusal(f"judge_through_text of {scorer.label}: {SINGLE_TOKENS}")
        return
    if _reads_steps(scorer) and plan.method.per_token(plan.settings):
        raise Refusal(f"{scorer.label} is a process reward model: {SINGLE_TOKENS}")
    check_token_ids(policy, scorer)


def check_guided(
    policy: Model, scorer: Model, reading: ScorerOptions, config: GuidanceConfig
) -> None:
    """Raises Refusal or ValueError: this scorer cannot guide single tokens of this policy."""
    engine = policy.group(EngineOptions)
    if engine.on_servers or engine.on_vllm:
        where = "on servers" if engine.on_servers else "in vLLM"
        raise Refusal(f"{policy.label} is decoded {where}, and guide decodes in this process: give "
                      "this method other policies, or this policy searches alone")  # fmt: skip
    if pooling_urls(scorer.model):
        raise Refusal(f"{scorer.label} is on pooling servers, which read a text anew at each call: "
                      "searches alone ask them; give this method other scorers")  # fmt: skip
    if scorer.group(JudgeOptions).judge_through_text or _reads_steps(scorer):
        raise Refusal(f"{scorer.label} reads responses as text, and guide values single tokens: "
                      "give this method other scorers")  # fmt: skip
    if config.top_k is None and not _implicit(scorer, reading):
        raise Refusal(
            f"top_k 0 is the whole vocabulary, which only an implicit reward scores at "
            f"once; {scorer.label} is none: give a top_k, or other scorers"
        )
    if config.kl_coef and reading.reference is None:
        raise Refusal(f"kl_coef {config.kl_coef:g} needs reference, the model that the policy was "
                      "tuned from")  # fmt: skip
    _refuse_stop_strings(policy)
    check_token_ids(policy, scorer)


def check_one_reference(scorer: Model, reading: ScorerOptions, reference: str) -> None:
    """Raises Refusal: an implicit reward has another reference, which its KL term has to have."""
    record = None if on_a_server(scorer.model) else find(scorer.model)
    own = reading.reference or (None if record is None else record.reference)
    if own not in (None, reference) and _implicit(scorer, reading):
        raise Refusal(f"reference {reference}: {scorer.label} is an implicit reward over {own}, "
                      "which guide has for its KL term, too: drop reference")  # fmt: skip


def _refuse_stop_strings(policy: Model) -> None:
    """Raises Refusal: the policy's responses end at strings, which single tokens do not show."""
    record = find(policy.model)
    if record is not None and record.stop:
        raise Refusal(f"{policy.label} ends its responses at {' or '.join(map(repr, record.stop))},"
                      " which guide does not see: give this method other policies")  # fmt: skip


def check_token_ids(policy: Model, scorer: Model) -> None:
    """Raises ValueError: the scorer's token ids mean something else than the policy's."""
    if not on_a_server(scorer.model) and not _reads_steps(scorer):
        _same_tokens(policy.model, scorer.model)


@cache
def _same_tokens(policy: str, scorer: str) -> None:
    from guided_decode.checkpoints.tokenizer_match import TokenizersDiffer, check_tokenizers

    own, theirs = _tokenizer(policy), _tokenizer(scorer)
    if own is None or theirs is None:
        # What loads it compares what there is.
        return
    try:
        check_tokenizers(own, theirs)
    except TokenizersDiffer as error:
        raise Refusal(f"{scorer} has another tokenizer than {policy} ({error}): give this method "
                      "other scorers, or a search and judge_through_text") from error  # fmt: skip


@cache
def _tokenizer(name: str) -> Any:
    from guided_decode.checkpoints.source import open_source
    from guided_decode.checkpoints.tokenizer_files import load_tokenizer

    try:
        return load_tokenizer(open_source(location(name)))
    except (OSError, ValueError):
        return None


def _reads_steps(scorer: Model) -> bool:
    if on_a_server(scorer.model):
        return False
    record = find(scorer.model)
    kind = scorer.get("kind") or (None if record is None else record.kind)
    return bool(kind == "process-reward")


def _implicit(scorer: Model, reading: ScorerOptions) -> bool:
    record = None if on_a_server(scorer.model) else find(scorer.model)
    known = reading.given().get("kind") or (None if record is None else record.kind)
    # A server says what it serves when it is asked.
    return known == "implicit" or is_address(scorer.model)


def on_a_server(name: str) -> bool:
    """Whether a scorer is one by its address."""
    return bool(pooling_urls(name)) or is_address(name)


def _exists(name: str) -> None:
    from pathlib import Path

    if not Path(name).is_file():
        location(name)
