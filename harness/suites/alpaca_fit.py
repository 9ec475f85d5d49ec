"""The length-controlled win rate of AlpacaEval 2: alpaca-eval's fit, and the files of its hub that it rests on."""

from __future__ import annotations

import csv
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..answering import read_text
from ..interfaces import MambabenchError, Review, Unsupported
from .chat_configs import AlpacaEvalConfig

if TYPE_CHECKING:
    from pandas import DataFrame

GAMED, DIFFICULTY = "df_gamed.csv", "instruction_difficulty.csv"
HUB = "tatsu-lab/alpaca_eval"
INDEX, HARD, BASELINE = "index", "instruction_difficulty", "not_gamed_baseline"
LONGER = "std_delta_len"
COLUMNS = (INDEX, HARD, "model", BASELINE, "preference", LONGER)
"""Of df_gamed.csv."""


def gamed_file(review: Review, config: AlpacaEvalConfig, items: int) -> Path:
    """df_gamed.csv, with the difficulties of the other file where that is given."""
    import pandas

    gamed = review.data[config.gamed] if config.gamed else _from_hub(GAMED)
    file = review.data[config.difficulty] if config.difficulty else None
    check_gamed(gamed, file, items)
    if file is None:
        return gamed
    frame = pandas.read_csv(gamed)
    frame[HARD] = frame[INDEX].map(pandas.read_csv(file, index_col=0).iloc[:, 0])
    review.scratch.mkdir(parents=True, exist_ok=True)
    written = review.scratch / GAMED
    frame.to_csv(written, index=False)
    return written


def check_gamed(gamed: Path, difficulty: Path | None, items: int) -> None:
    """Raises `MambabenchError` where alpaca-eval's fit would fail: it takes the difficulty of an item from the line of
    its place, which must be the first of some item, and needs all figures but preferences."""
    lines = csv.DictReader(read_text(gamed).splitlines())
    if lacking := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        raise MambabenchError(f"{gamed}: lacks the column {lacking[0]!r}; {GAMED} has {', '.join(COLUMNS)}")
    figures = (INDEX, LONGER, *(() if difficulty else (HARD,)))
    rows = list(lines)
    for number, row in enumerate(rows, 2):
        if wrong := [name for name in figures if not _is_figure(row[name])]:
            raise MambabenchError(f"{gamed}: line {number} has {row[wrong[0]]!r} for `{wrong[0]}`, which is a number")
        if str(row[BASELINE]).lower() not in ("true", "false"):
            raise MambabenchError(f"{gamed}: line {number} has {row[BASELINE]!r} for `{BASELINE}`: True or False")
    found = len(dict.fromkeys(row[INDEX] for row in rows[:items]))
    if found < items:
        raise MambabenchError(
            f"{gamed}: begins with {found} items, and there are {items} to score; {GAMED} begins with a line for each"
        )
    if difficulty is not None:
        _check_difficulty(difficulty, gamed, {int(float(row[INDEX])) for row in rows})


def _check_difficulty(file: Path, gamed: Path, wanted: set[int]) -> None:
    rows = list(csv.reader(read_text(file).splitlines()))[1:]
    fits = all(len(row) == 2 and all(map(_is_figure, row)) for row in rows)
    if not fits or not wanted <= {int(float(row[0])) for row in rows}:
        raise MambabenchError(f"{file}: {DIFFICULTY} has one figure for each row of {gamed}")


def _is_figure(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or "nan"))
    except ValueError:
        return False


def length_controlled(
    references: Sequence[str], answers: Sequence[str], preferences: Sequence[float | None], gamed: Path, model: str
) -> list[float]:
    """Each answer's preference (0 to 1) at equal lengths, as alpaca-eval's fit `length_controlled_v1` predicts it."""
    glm = importlib.import_module("alpaca_eval.metrics.glm_winrate")
    frame = as_annotations(references, answers, preferences, model)
    with _local(glm, {GAMED: gamed}), warnings.catch_warnings():
        # alpaca-eval's own use of scikit-learn, which our requirements hold to versions that take it.
        warnings.simplefilter("ignore", FutureWarning)
        glm.get_length_controlled_winrate(frame, save_weights_dir=None)
    return [float(value) for value in frame["glm_preference"]]


def as_annotations(
    references: Sequence[str], answers: Sequence[str], preferences: Sequence[float | None], model: str
) -> DataFrame:
    """Judged answers as alpaca-eval has them. A model that is called like the reference is still another one."""
    import pandas

    return pandas.DataFrame(
        {
            "preference": [math.nan if value is None else value for value in preferences],
            "output_1": list(references),
            "output_2": list(answers),
            "generator_1": "reference",
            "generator_2": f"model {model}",
        }
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    from .lm_eval_data import hub_answers

    try:
        return Path(
            hf_hub_download(repo_id=HUB, filename=name, repo_type="dataset", local_files_only=not hub_answers(HUB))
        )
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unsupported(
            f"alpaca-eval: {name} of {HUB} cannot be had ({reason}); the option `gamed` names a local copy, and "
            "`length_controlled = false` does without"
        ) from error


@contextmanager
def _local(module: Any, files: Mapping[str, Path]) -> Iterator[None]:
    """Has alpaca-eval take files of the hub from here."""
    original = module.hf_hub_download

    def download(*arguments: Any, filename: str, **options: Any) -> str:
        return str(files[filename])

    module.hf_hub_download = download
    try:
        yield
    finally:
        module.hf_hub_download = original
