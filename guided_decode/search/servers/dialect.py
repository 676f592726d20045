"""What a completions request says, in the words that a server knows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from guided_decode.search.draws import Draw
from guided_decode.search.requests import Sampling, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATH = "/v1/completions"
# "vllm": token ids in and out, and all that vLLM knows beside OpenAI's fields. "ids": OpenAI's own,
# with token ids as prompt. "text": the same with text.
Dialect = Literal["vllm", "ids", "text"]
DIALECTS: tuple[Dialect, ...] = ("vllm", "ids", "text")


@dataclass(frozen=True, slots=True)
class Served:
    """What servers said of themselves. max_model_len: None where they did not say.

    ends: token ids that end a response. tokenizer: the model's, as it is on this machine.
    """

    model: str
    dialect: Dialect
    ends: Collection[int]
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int | None = None

    def room(self, prefix: Tokens, wanted: int) -> int:
        """How many tokens may follow a prefix, of those wanted.

        Raises ValueError: the model has no place for one.
        """
        if self.max_model_len is None:
            return wanted
        left = self.max_model_len - len(prefix)
        if left < 1:
            raise ValueError(
                f"a prefix of {len(prefix)} tokens leaves no room for another: {self.model} is "
                f"served with max_model_len {self.max_model_len}"
            )
        return min(wanted, left)


def draw_body(served: Served, draw: Draw) -> dict[str, Any]:
    """The request for a continuation.

    Raises ValueError: stop strings, of a server that would not say where they ended.
    """
    how, vllm = draw.sampling, served.dialect == "vllm"
    if how.stop and not vllm:
        raise ValueError(
            f"stop={how.stop!r}: {served.model} is served without token ids, and a stop string "
            "does not say at which token it ended; vLLM's server returns ids"
        )
    body = _body(served, draw.prefix, served.room(draw.prefix, draw.max_tokens), how)
    # The drawn token's own is enough; OpenAI's servers take 0 for none.
    body |= {"seed": draw.seed, "logprobs": 0 if vllm else 1}
    if how.stop:
        body |= {"stop": list(how.stop), "include_stop_str_in_output": True}
    return body


def next_body(served: Served, prefix: Tokens, k: int) -> dict[str, Any]:
    """The request for the likeliest next tokens; k = −1 is the whole distribution."""
    body = _body(served, prefix, served.room(prefix, 1), Sampling(temperature=0.0))
    return body | {"logprobs": k}


def _body(served: Served, prefix: Tokens, most: int, how: Sampling) -> dict[str, Any]:
    # All that a server's own defaults (a generation config, say) would else decide.
    body: dict[str, Any] = {
        "model": served.model, "prompt": prompt_of(served, prefix), "max_tokens": most,
        "temperature": how.temperature, "top_p": how.top_p, "n": 1, "stream": False,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    if served.dialect == "vllm":
        body |= {
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
            "stop_token_ids": sorted(served.ends), "ignore_eos": False,
            "skip_special_tokens": False, "add_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
    return body


def prompt_of(served: Served, prefix: Tokens) -> list[int] | str:
    """A prefix as the server takes it.

    Raises ValueError: it takes text, and no text has exactly these tokens.
    """
    if served.dialect != "text":
        return list(prefix)
    text = str(served.tokenizer.decode(list(prefix), skip_special_tokens=False))
    if tuple(served.tokenizer.encode(text, add_special_tokens=False)) != tuple(prefix):
        raise ValueError(
            f"{served.model} is served by text alone, and these {len(prefix)} tokens are not what "
            f"their text is read as ({text[-40:]!r}): serve it by vLLM, which takes token ids"
        )
    return text
