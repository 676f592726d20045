"""Small tokenizers with the tokens of the small models, to save beside them."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCAB

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB)))


def word_tokenizer(words=WORDS, **special):
    """One token a word; special tokens as the small models' configs have them."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names | special)


def swapped():
    """Another tokenizer of the same size: two words have each other's ids."""
    words = list(WORDS)
    words[7], words[8] = words[8], words[7]
    return word_tokenizer(words)
