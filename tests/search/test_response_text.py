"""The text of pieces: a piece's text is a beginning of what it grows into, to the byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from guided_decode import tiny_tulu
from guided_decode.search.response_text import ResponseText
from tests.checkpoints.tokenizer_files import word_tokenizer
from tests.search.other_tokenizers import SAMPLE, byte_fallback, byte_level

TOKENIZERS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback, no first space": lambda: byte_fallback(strips=False),
    "tiny-tulu": lambda: AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft")),
}
# What a text can hold; U+FFFD itself would look like a cut.
TEXTS = st.text(
    st.one_of(st.sampled_from(sorted(set(SAMPLE))), st.characters(exclude_categories=["Cs"])),
    max_size=12,
).filter(lambda text: "\ufffd" not in text)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_pieces_are_beginnings_of_the_whole(name, text):
    tokenizer = TOKENIZERS[name]()
    reader = ResponseText(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    whole = reader.decode(ids, final=True)
    assert whole == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    before = ""
    for i in range(len(ids) + 1):
        piece = reader.decode(ids[:i], final=False)
        assert piece.startswith(before)
        assert whole.startswith(piece)
        before = piece
    assert before == whole


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_a_character_shows_when_its_last_byte_is_there(name):
    tokenizer = TOKENIZERS[name]()
    reader = ResponseText(tokenizer)
    bytes_ = {
        "byte-level": ["ð", "Ł", "ĺ", "Ģ"],
        "byte-fallback": ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"],
    }[name]
    a, emoji = tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids(bytes_)
    shown = [reader.decode([a, *emoji, *emoji[:i]], final=False) for i in range(5)]
    assert shown == ["a😀", "a😀", "a😀", "a😀", "a😀😀"]
    # At the end of a response they are what they are: no character.
    assert reader.decode([a, *emoji[:2]], final=True) == "a\ufffd"
    # Bytes that nothing can complete are none in a piece, too.
    assert reader.decode([*emoji[:2], a], final=False) == "\ufffda"


def test_a_token_may_end_one_character_and_begin_another():
    core = Tokenizer(models.BPE({"a": 0, "Ã": 1, "©": 2, "aÃ": 3}, []))
    core.decoder = decoders.ByteLevel()
    reader = ResponseText(PreTrainedTokenizerFast(tokenizer_object=core))
    assert reader.decode([3], final=False) == "a"
    assert reader.decode([3, 2], final=False) == "aé"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_not_in_the_text(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("an", add_special_tokens=False)
    around = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert ResponseText(tokenizer).decode(around, final=True) == "an"


def test_tokens_that_are_whole_words_are_the_tokenizers_own_text():
    tokenizer = word_tokenizer()
    assert ResponseText(tokenizer).decode([5, 9, 2], final=True) == "w5 w9"


def test_what_does_not_say_its_bytes_is_refused():
    class Slow:
        pass

    with pytest.raises(ValueError, match="is a Slow, which does not say which bytes its tokens"):
        ResponseText(Slow())
    core = Tokenizer(models.BPE({"a": 0}, []))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.CTC()])
    with pytest.raises(ValueError, match="decodes by CTC beside bytes, which is not known here"):
        ResponseText(PreTrainedTokenizerFast(tokenizer_object=core))
