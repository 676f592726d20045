"""Prompt formats, exact to the byte, and how their text becomes token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from guided_decode.checkpoints.families import BosRule

Message = Mapping[str, str]
# How a final assistant turn ends: as the chat template ends it ("turn"), at EOS with nothing after
# it, which is where reward models were read in training ("eos"), or not at all ("open").
End = Literal["turn", "eos", "open"]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One chat format. `{eos}` stands for the tokenizer's EOS.

    turns: role to (text before the message, text after it), for all roles but the assistant.
    assistant: the text before an assistant's message, which is also the generation prompt.
    between: what follows an assistant's message before another turn.
    final: what follows the last assistant's message.
    eos_token: the EOS of the checkpoints that were trained on the format.
    bos: whether the training text began with BOS.
    default_system: the system message of a conversation that has none; "" is none.
    single: one question and its answer, without earlier turns.
    """

    name: str
    turns: tuple[tuple[str, tuple[str, str]], ...]
    assistant: str
    between: str
    final: str
    eos_token: str
    bos: bool
    default_system: str = ""
    single: bool = False


_TULU_TURNS = (
    ("system", ("<|system|>\n", "\n")),
    ("user", ("<|user|>\n", "\n")),
)

_ORZ_BEFORE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
    "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
    "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
    "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> answer here </answer>. User: You must put your answer inside <answer> "
    "</answer> tags, i.e., <answer> answer here </answer>. And your final answer will be extracted "
    "automatically by the \\boxed{} tag.\nThis is the problem:\n"
)
_THINK = " Please think step-by-step and put your final answer within \\boxed{}."

_RECORDS = (
    PromptFormat(
        # Tulu 2 and 2.5. The newline after <|assistant|> matters.
        name="tulu-2",
        turns=_TULU_TURNS,
        assistant="<|assistant|>\n",
        between="{eos}\n",
        final="{eos}\n",
        eos_token="</s>",
        bos=True,
    ),
    PromptFormat(
        # Trained through the chat template, which has no BOS.
        name="tulu-3",
        turns=_TULU_TURNS,
        assistant="<|assistant|>\n",
        between="{eos}\n",
        final="{eos}",
        eos_token="<|end_of_text|>",
        bos=False,
    ),
    PromptFormat(
        # HALOs of 2024: human_prefix "\n<|user|>\n", assistant_prefix "\n<|assistant|>\n", no
        # suffixes; only the last response gets an EOS, after a space.
        name="halos",
        turns=(("user", ("\n<|user|>\n", "")),),
        assistant="\n<|assistant|>\n",
        between="",
        final=" {eos}",
        eos_token="</s>",
        bos=True,
    ),
    PromptFormat(
        # The tokenizers of Qwen2.5-Math-Instruct and of the process reward models on it.
        name="qwen-2.5-math",
        turns=(
            ("system", ("<|im_start|>system\n", "<|im_end|>\n")),
            ("user", ("<|im_start|>user\n", "<|im_end|>\n")),
        ),
        assistant="<|im_start|>assistant\n",
        between="{eos}\n",
        final="{eos}\n",
        eos_token="<|im_end|>",
        bos=False,
        default_system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    PromptFormat(
        # SmolLM2-Instruct's tokenizer. Its BOS is <|im_start|>, which the turns begin with anyway.
        name="smollm2",
        turns=(
            ("system", ("<|im_start|>system\n", "<|im_end|>\n")),
            ("user", ("<|im_start|>user\n", "<|im_end|>\n")),
        ),
        assistant="<|im_start|>assistant\n",
        between="{eos}\n",
        final="{eos}\n",
        eos_token="<|im_end|>",
        bos=False,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    PromptFormat(
        # Its training code, zero_setting_base. A response ends at </answer>, with no EOS after it.
        name="open-reasoner-zero",
        turns=(("user", (_ORZ_BEFORE, "")),),
        assistant="\nAssistant: <think>",
        between="",
        final="",
        eos_token="<|endoftext|>",
        bos=True,
        single=True,
    ),
    PromptFormat(
        # The prompts of value-guided search: DeepSeek-R1's turns and a request of its own.
        name="deepseek-r1-math",
        turns=(("user", ("<｜User｜>", _THINK)),),
        assistant="<｜Assistant｜><think>\n",
        between="{eos}",
        final="{eos}",
        eos_token="<｜end▁of▁sentence｜>",
        bos=True,
        single=True,
    ),
    PromptFormat(
        # skywork-o1-prm-inference, prepare_input; the response ends with its last step.
        name="skywork-prm",
        turns=(("user", ("", "\n")),),
        assistant="",
        between="",
        final="",
        eos_token="<|im_end|>",
        bos=True,
        single=True,
    ),
    PromptFormat(
        # The card of math-shepherd-mistral-7b-prm: question, space, steps.
        name="math-shepherd",
        turns=(("user", ("", " ")),),
        assistant="",
        between="",
        final="",
        eos_token="</s>",
        bos=True,
        single=True,
    ),
)

FORMATS: dict[str, PromptFormat] = {record.name: record for record in _RECORDS}


def find_format(name: str) -> PromptFormat:
    """The format of that name. Raises ValueError for an unknown one."""
    if name not in FORMATS:
        raise ValueError(f"prompt format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def render(
    messages: Sequence[Message],
    prompt_format: PromptFormat | str,
    *,
    add_generation_prompt: bool = False,
    end: End = "turn",
    eos_token: str | None = None,
) -> str:
    """The text of a conversation, without BOS.

    Args:
        messages: dicts with "role" and "content".
        prompt_format: a format, or the name of one.
        add_generation_prompt: end with the text after which the assistant answers.
        end: how a final assistant turn ends.
        eos_token: the tokenizer's; None takes the format's own.

    Raises:
        ValueError: no messages, an unknown role, content that is not text, a system message that
            is not the first, earlier turns in a format that has none, or an `end` or generation
            prompt that the last message does not fit.
    """
    record = find_format(prompt_format) if isinstance(prompt_format, str) else prompt_format
    _check_messages(messages, record)
    _check_end(messages[-1]["role"], add_generation_prompt, end)
    eos = record.eos_token if eos_token is None else eos_token
    turns = dict(record.turns)
    text = ""
    if record.default_system and messages[0]["role"] != "system":
        text = record.default_system.join(turns["system"])
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            after = record.between if i < len(messages) - 1 else _final(record, end)
            text += record.assistant + message["content"] + after.replace("{eos}", eos)
        else:
            before, after = turns[message["role"]]
            text += before + message["content"] + after
    return text + record.assistant if add_generation_prompt else text


def _final(record: PromptFormat, end: End) -> str:
    if end == "open" or "{eos}" not in record.final:
        return record.final if end == "turn" else ""
    return record.final if end == "turn" else record.final.partition("{eos}")[0] + "{eos}"


def _check_messages(messages: Sequence[Message], record: PromptFormat) -> None:
    roles = ("assistant", *(role for role, _ in record.turns))
    if not messages:
        raise ValueError(f"no messages: {record.name} expects at least one (role, content)")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in roles:
            raise ValueError(
                f"message {i} has the role {role!r}: {record.name} expects one of "
                f"{', '.join(sorted(roles))}"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"message {i} ({role}) has content of type {type(content).__name__}: expected text"
            )
        if role == "system" and i > 0:
            raise ValueError(f"message {i} has the role 'system': it may only be the first")
    asked = [message["role"] for message in messages]
    if record.single and asked not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"messages of {', '.join(asked)}: {record.name} has one turn, and expects the user's "
            "message, alone or with the assistant's response"
        )


def _check_end(last_role: str, add_generation_prompt: bool, end: End) -> None:
    if end not in ("turn", "eos", "open"):
        raise ValueError(f"end={end!r}: expected 'turn', 'eos' or 'open'")
    if add_generation_prompt and last_role == "assistant":
        raise ValueError(
            "the last message is the assistant's, and a generation prompt was asked for: add the "
            "user's next message, or render without add_generation_prompt"
        )
    if end != "turn" and last_role != "assistant":
        raise ValueError(
            f"end={end!r} ends an assistant's response, but the last message is the {last_role}'s: "
            "add the response, or leave end='turn'"
        )


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    prompt_format: PromptFormat | str,
    *,
    add_generation_prompt: bool = False,
    end: End = "turn",
    bos: BosRule = "policy",
) -> list[int]:
    """Token ids of a conversation, with the tokenizer's own EOS.

    bos: "drop" never begins with BOS; "keep" and "policy" do where the format was trained so and
    the tokenizer has one. With end="eos" the last id is the EOS, where reward models are read, but
    in formats whose responses end without one.

    Raises ValueError: as `render`; or the tokenizer has no EOS; or it does not read its EOS in
    the text as one token.
    """
    record = find_format(prompt_format) if isinstance(prompt_format, str) else prompt_format
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer has no EOS: {record.name} ends responses with it; set it")
    text = render(
        messages,
        record,
        add_generation_prompt=add_generation_prompt,
        end=end,
        eos_token=tokenizer.eos_token,
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    ends = end == "eos" and "{eos}" in record.final
    if ends and (not ids or ids[-1] != tokenizer.eos_token_id):
        raise ValueError(
            f"the text ends with {tokenizer.eos_token!r} but its last token id is {ids[-1:]}: "
            f"expected {tokenizer.eos_token_id}; the tokenizer must read its EOS as one token"
        )
    if bos != "drop" and record.bos and tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    return ids
