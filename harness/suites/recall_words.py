"""The words that questions of recall are made of where a plan names no others: simple ones, in plain English."""

from __future__ import annotations

LEXICON = """
first: Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nina Oscar Paul Rosa Sam Tina Victor
first: Alice Bob Carl Diana Eric Fiona George Helen Ivan Julia Karl Lucy Max Nora Otto Peter Ruth Simon Tom Wendy
last: Baker Brook Carter Dale Field Fisher Ford Gray Hall Hill Hunter King Lake Marsh Mason Miller North Page Parker
last: Pool Reed Rivers Rose Shaw Smith Snow Stone Taylor Walker Ward Waters Webb Wells West White Wood Young Berry Cook
last: Church
span: apple river stone candle window garden horse silver paper bridge winter button ladder orange basket mirror
span: pencil kitchen feather blanket hammer island pepper rabbit saddle ticket velvet wagon yellow anchor bottle carpet
filler: The sun was warm and the grass was green.
filler: A little dog ran to the park.
filler: They sat down and had some tea.
filler: The old man looked at the sea.
filler: It rained all day and they stayed at home.
filler: The children sang a happy song.
filler: She opened the door and went outside.
filler: A bird sat in the big tree.
filler: He was tired and wanted to sleep.
filler: The road went up and then down again.
filler: There was a small house near the water.
filler: They walked for a long time.
filler: The night was dark and quiet.
filler: Everybody was glad to see the snow.
filler: The boat moved slowly along the shore.
"""


def _lines(kind: str) -> list[str]:
    return [words for line in LEXICON.splitlines() for of, _, words in [line.partition(": ")] if of == kind]


NAMES = tuple(
    f"{first} {last}" for last in " ".join(_lines("last")).split() for first in " ".join(_lines("first")).split()
)
NUMBERS = tuple(map(str, range(1000, 10000)))
SPAN = tuple(" ".join(_lines("span")).split())
FILLER = tuple(_lines("filler"))
