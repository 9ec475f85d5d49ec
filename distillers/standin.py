"""A small seeded language with known truth, so that a whole plan runs in minutes with nothing to download.

It has what conversions are known to lose, looking up and copying, and some of what they keep, plain sentences:

    note anna tea anna tea , omar salt omar salt .   facts: a name and a thing, each told twice
    ask omar salt .                                  a question, answered from the facts
    copy fox owl elk bee | fox owl elk bee .         a span and its copy
    the small miller sees a boat .                   a sentence of little entropy

What is held out is decided by the words alone, never by the seed: every fragment of four words of a fact list (two
neighbouring facts) or of a span belongs either to the training part or to the held-out part. A held-out list or span
has no fragment in common with any training text, so that answers come from the context and not from memory.

The language is made to be learnt by 150,000 parameters within a million tokens: few words, a kind of word for each
purpose, and facts told twice, which reward looking one word back, as looking up needs it.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.interfaces import Job
from .plugin import StandinConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEXICON = """
names: anna omar lena ivan rosa hugo nina paul
things: tea salt coal silk corn wool iron milk
beasts: fox owl elk bee cat hen ram eel ant bat cow dog jay pig rat yak
subjects: miller sailor baker child teacher smith
verbs: sees likes builds paints follows
adjectives: small red grey quiet
objects: boat house river garden tower road
marks: note ask copy | , . the a
"""
WORDS = {kind: words.split() for kind, words in (line.split(": ") for line in LEXICON.strip().splitlines())}
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
VOCABULARY = (UNKNOWN, BEGIN, END, *(word for words in WORDS.values() for word in words))

FRAGMENT = 4
"""Words of a fragment that is wholly in one part."""
CHOICES = 4


def held_out(fragment: Sequence[str]) -> bool:
    """Whether a fragment of four words belongs to the held-out part; a quarter does."""
    return zlib.crc32(" ".join(fragment).encode()) % 4 == 0


def fragments(words: Sequence[str], stride: int = 1) -> Iterator[tuple[str, ...]]:
    """The fragments of a span (stride 1) or of a list of facts, names and things in turn (stride 2)."""
    for first in range(0, len(words) - FRAGMENT + 1, stride):
        yield tuple(words[first : first + FRAGMENT])


class Writer:
    """Writes one document or item; its random numbers are its own, so that documents depend on their index alone."""

    def __init__(self, part: str, index: int, seed: int) -> None:
        self.random = random.Random(f"{seed}/{part}/{index}")
        self.held = part not in ("train", "pairs")

    def facts(self, count: int) -> list[str]:
        """`count` facts about different names: name, thing, name, thing, …; every fragment belongs to this part."""
        while True:
            names = self.random.sample(WORDS["names"], count)
            words = [word for name in names for word in (name, self.random.choice(WORDS["things"]))]
            if all(held_out(fragment) == self.held for fragment in fragments(words, stride=2)):
                return words

    def span(self, count: int) -> list[str]:
        """`count` different words; every fragment belongs to this part."""
        while True:
            words = self.random.sample(WORDS["beasts"], count)
            if all(held_out(fragment) == self.held for fragment in fragments(words)):
                return words

    def sentence(self) -> list[str]:
        """`the small miller sees a red boat .`; the adjectives may be missing."""
        before = [self._skewed("adjectives")] if self.random.random() < 0.5 else []
        between = [self._skewed("adjectives")] if self.random.random() < 0.3 else []
        subject, verb, thing = (self._skewed(kind) for kind in ("subjects", "verbs", "objects"))
        return ["the", *before, subject, verb, "a", *between, thing, "."]

    def document(self) -> list[str]:
        """Facts, then in random order a question about each, a span with its copy, and up to two sentences."""
        return self._sections(self.random.randint(3, 4), self.random.randint(3, 5), copy_first=False)

    def prompt(self) -> list[str]:
        """A document whose first 23 tokens, with the begin token, are three facts and a span that is about to be
        copied: a continuation has something to copy, to look up, and to choose freely."""
        return self._sections(3, 5, copy_first=True)

    def _sections(self, facts: int, span: int, copy_first: bool) -> list[str]:
        pairs, beasts = self.facts(facts), self.span(span)
        copy = ["copy", *beasts, "|", *beasts, "."]
        later = [["ask", *fact, "."] for fact in told(pairs)]
        later += [self.sentence() for _ in range(self.random.randint(0, 2))]
        later += [] if copy_first else [copy]
        self.random.shuffle(later)
        sections = [copy, *later] if copy_first else later
        return [*noted(pairs), *(word for section in sections for word in section)]

    def lookup(self) -> dict[str, Any]:
        """An item: four facts, perhaps a sentence, and the beginning of a question; the choices are the things."""
        random = self.random
        while True:
            pairs = self.facts(CHOICES)
            if len(set(pairs[1::2])) == CHOICES:
                break
        name, answer = random.choice(list(told(pairs)))
        context = [*noted(pairs), *self._perhaps_sentence(), "ask", name]
        wrong = [thing for thing in pairs[1::2] if thing != answer]
        return self._item(context, answer, wrong)

    def copy(self) -> dict[str, Any]:
        """An item: facts, perhaps a sentence, and a span to be copied; wrong choices have two words exchanged."""
        pairs, span = self.facts(3), self.span(5)
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            one, two = self.random.sample(range(len(span)), 2)
            changed = list(span)
            changed[one], changed[two] = span[two], span[one]
            if (text := " ".join(changed)) not in wrong:
                wrong.append(text)
        return self._item([*noted(pairs), *self._perhaps_sentence(), "copy", *span, "|"], " ".join(span), wrong)

    def pair(self) -> dict[str, str]:
        """A preference: an item of either kind, its answer, and one of its wrong choices."""
        item = self.random.choice((self.lookup, self.copy))()
        wrong = self.random.choice([choice for choice in item["choices"] if choice != item["answer"]])
        return {"prompt": item["context"] + " ", "chosen": item["answer"] + " .", "rejected": wrong + " ."}

    def _perhaps_sentence(self) -> list[str]:
        return self.sentence() if self.random.random() < 0.5 else []

    def _skewed(self, kind: str) -> str:
        """A word of a kind, each half as likely as the one before."""
        (word,) = self.random.choices(WORDS[kind], [2.0**-place for place in range(len(WORDS[kind]))])
        return word

    def _item(self, context: Sequence[str], answer: str, wrong: Sequence[str]) -> dict[str, Any]:
        choices = [answer, *wrong]
        self.random.shuffle(choices)
        return {"context": " ".join(context), "choices": choices, "label": choices.index(answer), "answer": answer}


def told(pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names with their things."""
    return zip(pairs[::2], pairs[1::2], strict=True)


def noted(pairs: Sequence[str]) -> list[str]:
    """Facts as a section: `note anna tea anna tea , omar salt omar salt .`"""
    words = [word for fact in told(pairs) for word in (*fact, *fact, ",")]
    return ["note", *words[:-1], "."]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `encode` puts the begin token in front, as Llama's tokenizers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(VOCABULARY)}
    fast = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, words[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=1 << 30,
        clean_up_tokenization_spaces=False,
    )


class Standin:
    """The source `standin`."""

    def __init__(self, config: StandinConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        """Writes `data.jsonl` and `tokenizer/`; `pairs` without it, `tasks` as lm-eval's YAML with their items."""
        part, seed = self.config.part, self.config.seed
        if part == "tasks":
            write_tasks(job.out, self.config.items, seed)
            return
        if part == "pairs":
            write_lines(job.out / "data.jsonl", (Writer(part, i, seed).pair() for i in range(self.config.documents)))
            return
        writers = (Writer(part, index, seed) for index in range(self.config.documents))
        documents = (writer.prompt() if part == "prompts" else writer.document() for writer in writers)
        write_lines(job.out / "data.jsonl", ({"text": " ".join(words)} for words in documents))
        tokenizer().save_pretrained(job.out / "tokenizer")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


CHOOSE = """task: standin_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

GENERATE = """task: standin_{name}_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
  do_sample: false
filter_list:
  - name: trimmed
    filter:
      - function: regex
        regex_pattern: '^\\s*(.*?)\\s*$'
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_tasks(out: Path, items: int, seed: int) -> None:
    """Writes the likelihood tasks and their generative twins, which read the same held-out items."""
    write_lines(out / "lookup.jsonl", (Writer("lookup", index, seed).lookup() for index in range(items)))
    write_lines(out / "copy.jsonl", (Writer("copy", index, seed).copy() for index in range(items)))
    for name in ("lookup", "copy"):
        (out / f"standin_{name}.yaml").write_text(CHOOSE.format(name=name))
        (out / f"standin_{name}_generate.yaml").write_text(GENERATE.format(name=name))
