"""Text from one model, with its timing: `generate`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from .. import plugins
from ..config import Structurer
from ..documents import leading_token
from ..interfaces import Backend, Limits, MambabenchError, Prompt
from ..metrics import mean_accepted_length, tpot, ttft


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to continue [empty: begin of text].")
@click.option("--decoder", default="standard", show_default=True, help="The decoder component.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the decoder, such as k=4.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
def generate(
    model: Path,
    prompt: str,
    decoder: str,
    options: tuple[str, ...],
    new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Continue a prompt with MODEL: an artifact of a store, or a teacher's folder."""
    loaded = plugins.registry()
    choice = Structurer(loaded).choice("decoder", {"use": decoder, **_options(options)})
    with tempfile.TemporaryDirectory(prefix="mambabench-") as scratch:
        backend, artifact = _artifact(model, Path(scratch), loaded)
        stepper = backend.load(artifact, device, dtype)
        tokenizer = stepper.tokenizer
        begin = leading_token(tokenizer)
        ids = tokenizer.encode(prompt) or ([] if begin is None else [begin])
        if not ids:
            raise MambabenchError(f"{model}: the tokenizer has no token to begin a text with; give a --prompt")
        stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        limits = Limits(new_tokens=new_tokens, stop_tokens=stop, temperature=temperature, seed=seed)
        events: list[dict[str, Any]] = []
        answers = plugins.build(choice).generate(
            stepper, [Prompt(tuple(ids))], limits, lambda kind, /, **fields: events.append({"kind": kind, **fields})
        )
    click.echo(tokenizer.decode([*ids, *answers[0].ids], skip_special_tokens=True))
    click.echo(_timing(events), err=True)


def _artifact(model: Path, scratch: Path, loaded: plugins.Registry) -> tuple[Backend, Path]:
    record_file = model / "artifact.json"
    if record_file.is_file():
        record = json.loads(record_file.read_text())["backend"]
        choice = Structurer(loaded).choice("backend", {"use": record["name"], **record["config"]})
        return plugins.build(choice), model
    if not (model / "config.json").is_file():
        raise MambabenchError(f"{model}: neither an artifact of a store nor a transformers folder (no config.json)")
    backend = plugins.make(loaded.find("backend", "teacher"))
    layers = json.loads((model / "config.json").read_text()).get("num_hidden_layers", 0)
    artifact = scratch / "teacher"
    backend.convert(model, range(layers), artifact, seed=0)
    return backend, artifact


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    import tomllib

    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"expected KEY=VALUE, got {pair!r}", param_hint="--option")
        try:
            table[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = value
    return table


def _timing(events: list[dict[str, Any]]) -> str:
    bursts = [event for event in events if event["kind"] == "burst"]
    rounds = [event for event in events if event["kind"] == "round"]
    tokens = sum(burst["tokens"] for burst in bursts)
    at_s = [burst["at_s"] for burst in bursts]
    text = f"[{tokens} tokens, first after {ttft(at_s) * 1000:.1f} ms"
    if len(bursts) > 1:
        text += f", {1 / tpot(at_s, [burst['tokens'] for burst in bursts]):.1f} tokens/s"
    if rounds:
        text += f", {mean_accepted_length([event['accepted'] for event in rounds]):.2f} tokens a round"
    return text + "]"
