"""A store as a small plan would leave it, failures included."""

import functools

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.acceptance import Acceptance
from mambabench.reports.build import build
from mambabench.reports.cost import Cost, Steps
from mambabench.reports.losslessness import Losslessness
from mambabench.reports.options import NoOptions
from mambabench.reports.quality import Quality
from mambabench.reports.speculation import Speculation
from mambabench.reports.speed import Speed

MODELS = (("teacher", None, 0.95, 1.0), ("half", 0.5, 0.85, 1.2), ("pure", 0, 0.5, 1.6))


@pytest.fixture(scope="session")
def make(stores, tmp_path_factory):
    """Makes a store of three models; equal ones are made once, so tests only read them."""

    @functools.cache
    def store(seeds=(0,), differing=0, check=True, told=()):
        builder = stores.Builder(tmp_path_factory.mktemp("stores") / "store", seeds=seeds)
        for model, keep, *_ in MODELS:
            builder.model(model, keep, teacher=model == "teacher")
        for model, _, chance, nll in MODELS:
            for seed in seeds if model != "teacher" else seeds[:1]:
                _model(stores, builder, model, seed, chance, nll, differing, check, told)
        builder.skip("pure/lookup/other@seed0", "shown elsewhere")
        return builder.write()

    return store


def _model(stores, builder, model, seed, chance, nll, differing, check, told):
    rng = np.random.default_rng([seed, len(model)])
    facts = [
        {"name": "training_tokens", "value": 300_000, "unit": "tokens"},
        {"name": "trainable_share", "value": 0.25},
        {"name": "peak memory", "value": 512_000_000, "unit": "byte"},
    ]
    steps = [{"step": step, "tokens": 10 * step, "loss": 4.0 / (step + 1)} for step in range(4)]
    builder.step(f"{model}/align@seed{seed}", "train", {"loss": steps}, facts=facts)
    tasks = [*stores.samples(rng, "lookup", chance=chance), *stores.samples(rng, "copy", chance=chance - 0.1)]
    builder.step(f"{model}/-/tasks@seed{seed}", records={"sample": tasks})
    if model == "pure":
        builder.step(f"{model}/-/perplexity@seed{seed}", state="timeout", reason="longer than 180 s")
        builder.step(
            f"{model}/lookup/speed@seed{seed}",
            state="crashed",
            reason="signal 11",
            use="speed",
            traits=("pair", "alone"),
        )
        return
    builder.step(f"{model}/-/perplexity@seed{seed}", records={"sample": stores.losses_of_text(rng, nll)})
    timed, rounds = stores.bursts(rng, {"subject": 0.0022, "reference": 0.002}, new_tokens=32, accepted=0.6)
    if check:
        equal = [
            {**row, "task": "batch 1", "metric": "equal", "value": float(i >= differing)}
            for i, row in enumerate(stores.samples(rng, items=16))
        ]
        builder.step(
            f"{model}/lookup/lossless@seed{seed}",
            records={"sample": equal, "round": rounds},
            use="losslessness",
            traits=("pair",),
        )
    builder.step(
        f"{model}/lookup/speed@seed{seed}",
        records={"burst": timed, "round": rounds},
        use="speed",
        traits=("pair", "alone"),
        facts=[
            {"name": "weights", "value": 2_000_000, "unit": "byte"},
            {"name": "bytes of a step, batch 1", "value": 4e6, "unit": "byte"},
            {"name": "cost of a round, K = 4, batch 1", "value": 0.002, "unit": "s", "arm": "subject"},
            {"name": "cost of a round, K = 0, batch 1", "value": 0.001, "unit": "s", "arm": "reference"},
            *({"name": f"{name}, batch 1", "value": value, "arm": "subject"} for name, value in told),
            {"name": "copy bandwidth", "value": 4e9, "unit": "byte/s"},
            {"name": "read bandwidth", "value": 5e9, "unit": "byte/s"},
            {"name": "distinct 4-grams, batch 1", "value": 0.25, "unit": "share", "arm": "subject"},
        ],
    )


@pytest.fixture(scope="session")
def report_of():
    """The report of a store, made once for each."""
    made = {
        "quality": Quality,
        "speculation": Speculation,
        "speed": Speed,
        "acceptance": Acceptance,
        "losslessness": Losslessness,
    }
    tables = {name: table(NoOptions()) for name, table in {**made, "cost": Cost, "steps": Steps}.items()}

    def fresh(store, with_plots=False, **more):
        makers = {name: functools.partial(lambda table: table, table) for name, table in {**tables, **more}.items()}
        return build(Results.read([store]), makers, with_plots=with_plots)

    once = functools.cache(fresh)
    return lambda store, again=False, **more: (fresh if more.keys() - {"with_plots"} or again else once)(store, **more)


@pytest.fixture(scope="session")
def frames_of(report_of):
    return lambda store: {section.name: section.frame for section in report_of(store).sections}
