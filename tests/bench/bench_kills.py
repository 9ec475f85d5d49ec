"""Kills runs of a plan at random moments, each followed by another run, and shows what was lost: nothing, it should be.

    python tests/bench/bench_kills.py FOLDER [--kills 20] [--seed 0] [-- words of `mambabench run`, else the plan tiny]

A run that is never killed comes first; where a disturbed store is complete before there were kills enough, another is
begun. Ends with an error unless no finished step ran twice or was lost, nothing was alive two seconds after a kill, and
every complete store has the quality numbers of the undisturbed one.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
IMPORTING = 0.15
"""The share of kills that come at any time after the start, perhaps among the imports; others come when a few more
steps are finished than at the kill before, so that all of the plan is met."""
PLAN = HERE.parents[1] / "plans" / "tiny.toml"


def killing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("killing", HERE.parent / "killing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    ours, words = sys.argv[1:], [str(PLAN)]
    if "--" in ours:
        ours, words = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    given = parser.parse_args(ours)
    tools, moments = killing(), random.Random(given.seed)

    began = time.monotonic()
    calm = given.folder / "calm"
    tools.at_once(["run", *words, "--store", calm], runs=1)
    wall = time.monotonic() - began
    expected = tools.quality(calm)
    starts = tools.began(calm).values()
    span = max(starts) - min(starts)
    print(f"undisturbed: {len(starts)} steps in {wall:.0f} s, of which {span:.0f} s in steps", flush=True)

    kills, stores, bad = 0, 0, 0
    while kills < given.kills:
        stores += 1
        store = given.folder / f"killed-{stores}"
        command = ["run", *words, "--store", store]
        while kills < given.kills:
            wanted, longest = None, wall - span
            if moments.random() > IMPORTING:
                more = moments.randrange(2 * len(starts) // given.kills + 1)
                wanted, longest = min(len(tools.began(store)) + more, len(starts) - 1), 3 * span / len(starts)
            kill = tools.killed(command, store, moments.uniform(0.0, longest), finished=wanted)
            if kill is None:
                break
            kills += 1
            bad += bool(kill.survivors or kill.undone)
            print(
                f"kill {kills}: after {kill.after_s:.1f} s, {kill.finished} steps finished, {kill.interrupted} "
                f"interrupted; alive 2 s later: {len(kill.survivors)}; lost or done again: {len(kill.undone)}",
                *kill.survivors,
                sep="\n  ",
                flush=True,
            )
        before = tools.began(store)
        tools.at_once(command, runs=1)
        undone = tools.lost_or_again(before, tools.began(store))
        same = tools.quality(store) == expected
        bad += bool(undone or not same)
        print(
            f"store {stores}: complete, lost or done again at last: {len(undone)}, quality numbers "
            f"{'equal' if same else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{kills} kills, {stores} stores, {bad} of them not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
