"""Words of the tiny world, its names, and which of them are held out; the tokenizer that spells them.

Words are tokens. Names are made up, three syllables each, and numbers are digits, so that any of them can be spelled:
what is held out is decided by the name or sum alone, never by a seed, and no text to learn from ever holds it. Every
two syllables that follow each other do so in names to learn from, too: else a model learns which ones never do.
"""

from __future__ import annotations

import zlib
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEXICON = """
things: tea salt coal silk corn wool iron milk honey glass wax rope soap ink clay oats
places: river tower garden harbour market forest bridge castle field island cave temple
jobs: miller sailor baker child teacher smith
objects: boat lamp drum ring book sword
adjectives: small red grey quiet
verbs: finds sees wants
ranks: first second last larger all
marks: note ask copy add story now of reverse where is the a | + , . and [INST] [/INST]
"""
WORDS = {kind: words.split() for kind, words in (line.split(": ") for line in LEXICON.strip().splitlines())}
SYLLABLES = [*[first + vowel for first in "bdfgklmnprstvz" for vowel in "aiu"][::2], "lo", "mo", "ro"]
NAMES = ["".join(syllables) for syllables in permutations(SYLLABLES, 3)]
DIGITS = [str(digit) for digit in range(10)]
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
BEHIND = "##"
"""Marks a piece that continues a word, as in BERT's WordPiece."""
VOCABULARY = (
    *(UNKNOWN, BEGIN, END),
    *(word for words in WORDS.values() for word in words),
    *(*SYLLABLES, *DIGITS),
    *(BEHIND + piece for piece in (*SYLLABLES, *DIGITS)),
)
LOW, HIGH = 10, 89
"""Of the numbers that are added; sums stay below 100."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
"""Chats as fschat's template `mistral` writes them."""


def held_out(*parts: str | int) -> bool:
    """Whether a name or the numbers of a sum belong to the held-out part; a quarter does."""
    return zlib.crc32(" ".join(map(str, sorted(parts))).encode()) % 4 == 0


OF_PART = {held: [name for name in NAMES if held_out(name) == held] for held in (False, True)}
"""Names of the training part (False) and of the held-out part (True)."""
_SPELLED = frozenset(NAMES)


def tokens_in(word: str) -> int:
    """Tokens of a word: a name has one a syllable, a number one a digit."""
    if word.isdigit():
        return len(word)
    return 3 if word in _SPELLED else 1


def tokenizer() -> PreTrainedTokenizerFast:
    """`encode` puts the begin token in front, as Llama's tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(VOCABULARY)}
    fast = Tokenizer(models.WordPiece(words, unk_token=UNKNOWN, continuing_subword_prefix=BEHIND))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.WordPiece(prefix=BEHIND, cleanup=False)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, words[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1 << 30,
        clean_up_tokenization_spaces=False,
    )
