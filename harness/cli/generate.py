"""Text from one model as it is made, with its timing: `generate`."""

from __future__ import annotations

import inspect
import math
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .. import metrics, plugins
from ..answers import gap
from ..config import ConfigError, Structurer
from ..documents import leading_token
from ..interfaces import DTYPES, Artifact, Backend, Binds, Decoder, Limits, MambabenchError, Prompt, Stepper, silent
from ..store import read_json

SCRATCH = "mambabench-"
WARM_UPS = 2
"""Answers until all is compiled and recorded: a prompt's reading is at the second one."""


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    """Ranges let through what is no number."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number that it can be.")
    return value


def _texts(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Python lets bytes through that are no characters, and tokenizers stumble over them."""
    for value in values:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise click.BadParameter(f"not UTF-8: {value!r}") from None
    return values


def _not_empty(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("an empty text appears everywhere.")
    return _texts(context, option, values)


@click.command("generate", short_help="Continue prompts with a model, and tell how fast it went.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    callback=_texts,
    help="Text to continue [empty: begin of text]. Of several, one is continued after the other.",
)
@click.option("--decoder", help="The decoder component [standard; with --draft or --k: speculative].")
@click.option("--draft", help="The draft: a component such as ngram or layers, or a model, named as MODEL is.")
@click.option("--k", type=click.IntRange(1), help="Drafted tokens a round.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the decoder or of its draft, such as adapt=true or draft.count=4.",
)
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), callback=_finite)
@click.option(
    "--top-k", default=0, show_default=True, type=click.IntRange(0), help="Sample of so many tokens; 0: of all."
)
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), callback=_finite)
@click.option("--stop", multiple=True, callback=_not_empty, help="A text that ends the answer where it appears.")
@click.option("--seed", default=0, show_default=True)
@click.option("--warmup", is_flag=True, help="Answer unseen before, so that times are not those of first calls.")
@click.option("--profile", type=click.IntRange(1), metavar="N", help="Take a round apart: means of N.")
@click.option("--gpus", type=click.IntRange(0), metavar="0", help="The GPU to use [none: CPU].")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16"]), help="[float32 on CPU, else bfloat16]")
def generate(
    model: Path,
    prompts: tuple[str, ...],
    decoder: str | None,
    draft: str | None,
    k: int | None,
    options: tuple[str, ...],
    new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: tuple[str, ...],
    seed: int,
    warmup: bool,
    profile: int | None,
    gpus: int | None,
    dtype: str | None,
) -> None:
    """Continue prompts with MODEL, an artifact of a store or a teacher's folder (builtin:tiny: the one that comes with
    mambabench), and tell how fast it went."""
    loaded = plugins.registry()
    device = "cpu" if gpus is None else "cuda:0"
    if gpus is not None:
        # As a step's child sees only the GPUs that it is given; the backend says so where torch finds none.
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus)
    if sys.stderr.isatty():
        click.echo(f"[loading {model}]", err=True)
    given = {"model": str(model), "draft": draft or ""}
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch, _named(Path(scratch), given):
        table = {"use": decoder or ("standard" if draft is None and k is None else "speculative"), **_table(options)}
        models: dict[str, Artifact] = {}
        if k is not None:
            table["k"] = k
        if draft is not None:
            chosen = _draft(draft, loaded)
            if chosen["use"] == "model":
                models[chosen["model"]] = _artifact(Path(draft), Path(scratch) / "draft", loaded)
            if not isinstance(options_of := table.get("draft", {}), Mapping):
                raise MambabenchError(f"--option draft={options_of} and --draft {draft}: say one of them")
            table["draft"] = {**options_of, **chosen}
        maker = _decoder(table, loaded)
        if isinstance(maker, Binds):
            maker.bind(models)
        subject = _artifact(model, Path(scratch) / "model", loaded)
        stepper = subject.backend.load(subject.path, device, dtype or DTYPES[device.partition(":")[0]])
        end = stepper.tokenizer.eos_token_id
        limits = Limits(
            new_tokens=new_tokens,
            stop_tokens=() if end is None else (end,),
            stop_strings=stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        asked = prompts or ("",)
        requests = [_request(model, prompt, number, stepper, limits) for number, prompt in enumerate(asked)]
        for prompt, request in zip(asked, requests, strict=True):
            for _ in range(WARM_UPS if warmup else 0):
                maker.generate(stepper, [request], limits, silent)
            click.echo(prompt, nl=False)
            try:
                events = _answer(maker, stepper, request, limits)
            finally:
                click.echo()
            for line in summary(events):
                click.echo(line, err=True)
        for line in shares(_profile(maker, stepper, requests[-1], limits, profile)) if profile else ():
            click.echo(line, err=True)


def summary(events: list[dict[str, Any]]) -> list[str]:
    """What a request's records say, in words: tokens, TTFT, tokens/s, acceptance, and what was predicted of it."""
    bursts = [event for event in events if event["kind"] == "burst"]
    rounds = [event for event in events if event["kind"] == "round"]
    facts = {event["name"]: event["value"] for event in events if event["kind"] == "fact"}
    at_s, tokens = [burst["at_s"] for burst in bursts], [burst["tokens"] for burst in bursts]
    text = f"[{sum(tokens)} token{'s' * (sum(tokens) != 1)}, first after {metrics.ttft(at_s) * 1000:.1f} ms"
    if len(bursts) > 1:
        text += f", {1 / metrics.tpot(at_s, tokens):.1f} tokens/s"
    lines = [text + "]"]
    if rounds:
        accepted, drafted = [event["accepted"] for event in rounds], [event["drafted"] for event in rounds]
        places = metrics.acceptance_by_position(accepted, max(drafted))
        rate = metrics.acceptance_rate(drafted, accepted)
        shares = f", {rate:.0%} of {sum(drafted)} drafted tokens accepted" if any(drafted) else ""
        by_place = f" (by position, of rounds: {' '.join(f'{place:.0%}' for place in places)})" if places else ""
        length = metrics.mean_accepted_length(accepted)
        script = ", by a script" if "scripted" in rounds[0] else ""
        lines.append(f"[{len(rounds)} rounds, {length:.2f} tokens a round{shares}{by_place}{script}]")
    times = [facts.get(f"adaptive K, {kind} time per token") for kind in ("predicted", "measured")]
    if None not in times:
        said, came = (f"{1 / seconds:.1f}" for seconds in times if seconds)
        lines.append(
            f"[K chosen: {facts['adaptive K, mean']:.1f} on average; {said} tokens/s predicted, {came} measured]"
        )
    return lines


def shares(figures: Mapping[str, tuple[float, str]]) -> list[str]:
    """One round taken apart, a line for each part: its time and its share of the whole."""
    times = {name: value for name, (value, unit) in figures.items() if unit == "s"}
    width = max(map(len, times), default=0)
    whole = times.get("whole", math.nan)
    lines = [f"{name:{width}}  {1000 * s:9.4f} ms  {s / whole:6.1%}" for name, s in times.items()]
    if "kernels" in figures:
        beside = figures.get("kernels beside the models")
        more = f", {beside[0]:.0f} beside the models" if beside else ""
        lines.append(f"{'kernels':{width}}  {figures['kernels'][0]:9.0f}{more}")
    return [f"[{line}]" for line in lines]


def _profile(
    maker: Decoder, stepper: Stepper, request: Prompt, limits: Limits, count: int
) -> Mapping[str, tuple[float, str]]:
    profile = getattr(maker, "profile", None)
    if profile is None:
        raise MambabenchError("--profile: this decoder cannot take its rounds apart")
    figures: Mapping[str, tuple[float, str]] = profile(stepper, [request], limits, count)
    if not figures:
        raise MambabenchError("--profile: the model decodes with its own loop, which cannot be taken apart")
    return figures


def _answer(maker: Decoder, stepper: Stepper, request: Prompt, limits: Limits) -> list[dict[str, Any]]:
    """Prints the answer as it is made, and returns the records."""
    events: list[dict[str, Any]] = []

    def emit(kind: str, /, **fields: Any) -> None:
        events.append({"kind": kind, **fields})

    def on_text(row: int, piece: str) -> None:
        click.echo(piece, nl=False)

    if "on_text" in inspect.signature(maker.generate).parameters:
        maker.generate(stepper, [request], limits, emit, on_text=on_text)  # type: ignore[call-arg]
    else:
        answers = maker.generate(stepper, [request], limits, emit)
        if not answers:
            raise MambabenchError("the decoder returned no answer: `generate` must return one for each prompt")
        on_text(0, gap(request.ids, answers[0].ids, stepper.tokenizer) + answers[0].text)
    return events


def _decoder(table: Mapping[str, Any], loaded: plugins.Registry) -> Decoder:
    try:
        maker: Decoder = plugins.build(Structurer(loaded).choice("decoder", table))
    except ConfigError as error:
        if error.path == "use":
            raise MambabenchError(f"--decoder: {error.message}") from None
        way = "use --decoder speculative" if {"draft", "k"} & table.keys() else "say --draft or --k"
        hint = f"; to draft, {way}" if table["use"] == "standard" else ""
        raise MambabenchError(f"decoder {table['use']}: {error}{hint}") from None
    return maker


def _request(model: Path, prompt: str, number: int, stepper: Stepper, limits: Limits) -> Prompt:
    """The prompt behind one leading token, as texts were learnt."""
    begin = leading_token(stepper.tokenizer)
    ids = stepper.tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    if not ids:
        raise MambabenchError(f"{model}: the tokenizer has no token to begin a text with; give a --prompt")
    room = stepper.max_context - len(ids)
    if limits.new_tokens > room:
        if room < 1:
            raise MambabenchError(f"--prompt has {len(ids)} tokens; the model has {stepper.max_context} positions")
        raise MambabenchError(
            f"--new-tokens {limits.new_tokens}: the model has {stepper.max_context} positions, "
            f"of which the prompt takes {len(ids)} and leaves {room}"
        )
    return Prompt(tuple(ids), number)


@contextmanager
def _named(scratch: Path, given: Mapping[str, str]) -> Iterator[None]:
    """Has errors name the folders that were given. A teacher's is taken over into one that is gone afterwards."""
    try:
        yield
    except MambabenchError as error:
        told = str(error)
        for folder, name in given.items():
            told = told.replace(str(scratch / folder), name)
        raise MambabenchError(told) from error


def _draft(draft: str, loaded: plugins.Registry) -> dict[str, Any]:
    if draft == "model" and not Path(draft).is_dir():
        raise MambabenchError("--draft model: give the folder of the model that drafts")
    if draft in loaded.components("draft") and draft != "model":
        return {"use": draft}
    if Path(draft).is_dir() or draft.startswith(plugins.BUILTIN):
        return {"use": "model", "model": draft}
    hint = plugins.suggest(draft, loaded.components("draft"))
    raise MambabenchError(f"--draft {draft}: neither the folder of a model nor a draft{hint}")


def _artifact(model: Path, scratch: Path, loaded: plugins.Registry) -> Artifact:
    if str(model).startswith(plugins.BUILTIN):
        model = plugins.shipped_teacher(str(model).removeprefix(plugins.BUILTIN), loaded)
    record_file = model / "artifact.json"
    if record_file.is_file():
        record = read_json(record_file).get("backend")
        if not isinstance(record, Mapping) or not isinstance(record.get("config"), Mapping) or "name" not in record:
            raise MambabenchError(f"{record_file}: names no backend, so this artifact is not a model")
        choice = Structurer(loaded).choice("backend", {"use": record["name"], **record["config"]})
        return Artifact(str(model), model, plugins.build(choice))
    if not (model / "config.json").is_file():
        raise MambabenchError(f"{model}: neither an artifact of a store nor a transformers folder (no config.json)")
    backend: Backend = plugins.make(loaded.find("backend", "teacher"))
    backend.convert(model, [], scratch, seed=0)
    return Artifact(str(model), scratch, backend)


def _table(pairs: tuple[str, ...]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        *outer, name = key.strip().split(".")
        if not equals or not name:
            raise click.BadParameter(f"expected KEY=VALUE, got {pair!r}", param_hint="--option")
        inside = table
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, Mapping):
                raise click.BadParameter(f"{part} has a value already, got {pair!r}", param_hint="--option")
        try:
            inside[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            inside[name] = value
    return table
