"""Plans: what is accepted, and one line for every mistake."""

import re

import pytest
from mambabench import MambabenchError


def error_of(planner, text):
    with pytest.raises(MambabenchError) as caught:
        planner.steps(text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(planner.folder / "toy.toml"))
    return message


def test_a_plan_becomes_checked_specifications(planner):
    plan = planner.read()
    assert plan.seeds == (0, 1)
    assert plan.stages["tune"].config.lr == 1.0
    assert isinstance(plan.stages["tune"].config.lr, float)
    assert plan.models["other"].backend == plan.models["half"].backend
    assert plan.models["other"].train == ("align",)
    assert plan.models["half"].selector.name == "uniform"
    assert plan.limits.timeout == 180.0
    assert plan.decoders["quick"].config.draft.name == "toy-draft"


def test_options_of_a_default_component_need_no_use(planner, plan_text):
    plan = planner.read(plan_text, 'decoders.quick.draft.model="half"')
    assert plan.decoders["quick"].config.draft.name == "toy-draft"
    assert plan.decoders["quick"].config.draft.config.model == "half"


def test_an_override_changes_one_key_and_the_plan_s_hash(planner, plan_text):
    plain = planner.read()
    changed = planner.read(plan_text, "models.half.keep=0.25", "name=other")
    assert changed.models["half"].selector.config.share == 0.25
    assert changed.name == "other"
    assert changed.sha256 != plain.sha256


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lr = 1", "lrr = 1", "stages.tune.lrr: unknown key; did you mean 'lr'?"),
        ("lr = 1", "lr = true", "stages.tune.lr: expected a number, got true"),
        ("lr = 1", 'lr = "1"', 'stages.tune.lr: expected a number, got "1"'),
        ("lr = 1", "sizes = 3", "stages.tune.sizes: expected a list, got 3"),
        ("lr = 1", 'sizes = [1, "2"]', 'stages.tune.sizes.1: expected a whole number, got "2"'),
        ("lr = 1", "mask = 1", "stages.tune.mask: expected true or false, got 1"),
        ("k = 2", "k = 2.0", "decoders.quick.k: expected a whole number, got 2.0"),
        (
            "k = 2",
            'draft = "toy-drafd"',
            "decoders.quick.draft.use: unknown draft 'toy-drafd'; did you mean 'toy-draft'?",
        ),
        ("k = 2", 'draft = { use = "toy-draft", modl = "half" }', "decoders.quick.draft.modl: unknown key"),
        (
            "k = 2",
            'draft = { use = "toy-draft", model = "haff" }',
            "decoders.quick.draft.model: unknown model 'haff'; did",
        ),
        ("k = 2", 'draft = { use = "toy-draft", text = "txt" }', "decoders.quick.draft.text: unknown data 'txt'; did"),
        ("keep = 0.5", "keep = true", "models.half.keep: expected a share of attention from 0 to 1, a list of layers"),
        ("keep = 0.5", "keep = 1.5", "models.half.keep: expected a share"),
        ("keep = 0.5", "", "models.half.keep: this key is missing"),
        ("keep = 0.5", 'keep = ["a"]', 'models.half.keep.layers.0: expected a whole number, got "a"'),
        ("keep = 0.5", "kept = 0.5\nkeep = 1", "models.half.kept: unknown key; did you mean 'keep'?"),
        (
            'use = "toy-plain"',
            'use = "toy-plan"',
            "decoders.plain.use: unknown decoder 'toy-plan'; did you mean 'toy-plain'?",
        ),
        ('use = "toy-plain"', "", "decoders.plain: `use` is missing"),
        ('data = "file"', "", "stages.tune.data: this key is missing"),
        ('data = "file"', 'data = "fille"', "stages.tune.data: unknown data 'fille'; did you mean 'file'?"),
        (
            'train = ["align"]\n[decoders',
            'train = ["aline"]\n[decoders',
            'models.next.train: unknown stage "aline"; did',
        ),
        ('start = "half"', 'start = "haff"', "models.next.start: unknown model"),
        ('start = "half"', 'start = "next"', "models.next.start: a circle of models: next -> next"),
        ('like = "half"', 'like = "hlaf"', "models.other.like: unknown model"),
        ('path = "teacher"', 'path = "teach"', "teacher.path: there is no folder"),
        ('path = "teacher"', 'path = "builtin:toy"', "teacher.path: unknown teacher 'toy'"),
        ('path = "teacher"', "", "teacher: give either `path`"),
        ('path = "teacher"', 'train = ["tune"]', "stages.tune.use: 'toy-stage' trains a given model"),
        ('file = "text.txt"', 'file = "txt.txt"', "data.file: there is no file"),
        ('file = "text.txt"', 'file = "hf:org/the name"', "data.file: 'org/the name' is no name of a data set"),
        ('part = "train"', 'part = "trian"', "data.text.part: "),
        ('part = "train"', 'prompts = "text"', "data.text.prompts: a circle of data: text -> text"),
        ('path = "teacher"', 'path = "org/name"', "(and nothing is fetched from a hub)"),
        ("lr = 1", "lr = nan", "stages.tune.lr: expected a finite number, got nan"),
        ('timeout = "3 min"', "timeout = inf", "limits.timeout: expected a time"),
        ('like = "half"', 'like = ["half"]', "models.other.like: unknown model"),
        ('steps = "next/quick/*"', 'steps = "nexxt/*"', "skip.0.steps: 'nexxt/*' fits no label"),
        ("seeds = [0, 1]", "seeds = 0", "seeds: expected a list of whole numbers, got 0"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds: a seed stands there twice"),
        ("schema = 1", "schema = 2", "schema: this version reads plans of schema 1, got 2"),
        ('timeout = "3 min"', 'timeout = "3 mins"', 'limits.timeout: expected a time such as "3 min"'),
        ('timeout = "3 min"', "timout = 3", "limits.timout: unknown key; did you mean 'timeout'?"),
        ('timeout = "3 min"', "train_gpus = 0", "limits.train_gpus: expected how many GPUs train a stage together"),
        ('timeout = "3 min"', "train_gpus = true", "limits.train_gpus: expected how many"),
        ('why = "too slow"', "", "skip.0.why: this key is missing"),
        ("[limits]", "[limit]", "limit: unknown key; did you mean 'limits'?"),
        ("[models.next]", "[models.teacher]", "models.teacher: this name is taken"),
        ("[models.next]", '[models."a b"]', "models.a b: expected a name of letters"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_would_be_right(planner, plan_text, old, new, expected):
    assert old in plan_text
    message = error_of(planner, plan_text.replace(old, new, 1) if "\n" not in old else plan_text.replace(old, new))
    assert expected in message


def test_broken_toml_and_an_absent_plan_name_the_file(planner, tmp_path):
    assert "not valid TOML" in error_of(planner, "seeds = [")
    from mambabench.harness.plan import read_plan

    with pytest.raises(MambabenchError, match=r"none\.toml: no such plan"):
        read_plan(tmp_path / "none.toml", planner.registry)


@pytest.mark.parametrize("override", ["models", "=3", "a..b=1", "name.x=1"])
def test_a_malformed_override_is_refused(planner, plan_text, override):
    with pytest.raises(MambabenchError, match="--set"):
        planner.read(plan_text, override)


def test_a_star_stands_for_each_table_that_has_the_key(planner, plan_text):
    before, plan = planner.read(), planner.read(plan_text, "stages.*.lr=0.5", "models.ha*.keep=0.25")
    assert plan.stages["tune"].config.lr == 0.5
    # `align` stands there without it, and is left alone.
    assert plan.stages["align"] == before.stages["align"]
    assert plan.models["half"].selector.config.share == 0.25
    with pytest.raises(MambabenchError, match=r"--set stages.\*.nothing=1: the plan has nothing of that name"):
        planner.read(plan_text, "stages.*.nothing=1")


def test_a_star_gives_an_option_that_no_table_has_to_those_that_take_it(planner, plan_text):
    text = plan_text.replace('use = "toy-stage"\ndata = "file"', 'use = "toy-together"\ndata = "file"')
    plan = planner.read(text, "stages.*.batch=8", "stages.*.mask=false", "data.*.prompts=file", "models.*.width=8")
    assert plan.stages["tune"].config.batch == 8
    assert not plan.stages["tune"].config.mask
    assert not plan.stages["align"].config.mask
    assert plan.data["labels"].source.config.prompts == "file"
    assert {model.backend.config.width for model in plan.models.values()} == {8}
    for override, message in (
        ("stages.*.bacth=8", "the plan has nothing of that name; did you mean 'batch'?"),
        ("stages.a*.batch=8", "the plan has nothing of that name; known: data, lr, mask, sizes"),
        ("stages.x*.lr=8", "the plan has nothing of that name"),
        ("stages.*.lr.deep=8", "stages.*.lr is no table of the plan"),
        ("decoders.*.draft.model=half", "the plan has nothing of that name"),
        ("stagse.*.lr=8", "the plan has nothing of that name"),
    ):
        with pytest.raises(MambabenchError, match=re.escape(message)):
            planner.read(text, override)


def test_a_batch_that_so_many_gpus_cannot_share_is_refused(planner, plan_text):
    text = plan_text.replace('use = "toy-stage"\ndata = "file"', 'use = "toy-together"\ndata = "file"')
    for number in (1, 2, 3, 4, 6, 12):
        assert planner.read(text, f"limits.train_gpus={number}").limits.train_gpus == number
    for number in (5, 24):
        with pytest.raises(MambabenchError) as caught:
            planner.read(text, f"limits.train_gpus={number}")
        file, message = planner.folder / "toy.toml", f"a multiple of limits.train_gpus = {number}"
        assert str(caught.value) == f"{file}: stages.tune.batch: expected {message}, got 12"
    # What one process trains alone is not shared.
    assert planner.read(plan_text, "limits.train_gpus=5").limits.train_gpus == 5


def test_a_broken_plug_in_s_traceback_is_shown_only_where_a_component_is_unknown(planner, plan_text, tmp_path):
    from mambabench.harness import plugins

    bad = tmp_path / "bad.py"
    bad.write_text("raise RuntimeError('out of order')")
    planner.registry = plugins.load([*planner.registry.files, bad])
    planner.steps()
    with pytest.raises(MambabenchError, match="RuntimeError: out of order"):
        planner.steps(plan_text.replace("toy-lossy", "from-bad"))


def test_a_model_may_be_a_folder_of_weights_in_place_of_a_parent(planner, plan_text):
    text = plan_text.replace("[decoders.plain]", '[models.baseline]\nuse = "toy"\npath = "teacher"\n[decoders.plain]')
    model = planner.read(text).models["baseline"]
    assert (model.path, model.selector, model.start) == (str(planner.folder / "teacher"), None, None)
    for line, message in (
        ("keep = 0", "models.baseline.keep: this key cannot stand beside `path`, whose folder is taken as it is"),
        ('start = "half"', "models.baseline.start: this key cannot stand beside `path`"),
        ("pth = 1", "models.baseline.pth: unknown key; did you mean 'path'?"),
    ):
        with pytest.raises(MambabenchError, match=re.escape(message)):
            planner.read(text.replace('path = "teacher"\n[dec', f'path = "teacher"\n{line}\n[dec'))
    for path, message in (("3", "expected a folder in quotes, got 3"), ('"nowhere"', "there is no folder")):
        with pytest.raises(MambabenchError, match=f"models.baseline.path: {message}"):
            planner.read(text.replace('path = "teacher"\n[dec', f"path = {path}\n[dec"))


SHIPPING = """
from dataclasses import dataclass
from pathlib import Path

from mambabench import Component, hookimpl


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    pass


def folder(config):
    return Path(__file__).parent / "inside"


def nowhere(config):
    return None


@hookimpl
def mambabench_components():
    for name, target in (("small", "folder"), ("lost", "nowhere"), ("renamed", "fodler")):
        yield Component(kind="teacher", name=name, target=f"{__name__}:{target}", config=Nothing)
"""


def test_a_teacher_may_come_with_a_plug_in(planner, plan_text, tmp_path):
    from mambabench.harness import plugins

    shipped = tmp_path / "plug-in"
    shipped.mkdir()
    (shipped / "shipping.py").write_text(SHIPPING)
    planner.registry = plugins.load([*planner.registry.files, shipped / "shipping.py"])
    text = plan_text.replace('path = "teacher"', 'path = "builtin:small"')
    with pytest.raises(MambabenchError, match=r"teacher.path: there is no folder .*inside"):
        planner.read(text)
    (shipped / "inside").mkdir()
    (shipped / "inside" / "config.json").write_text("{}")
    assert planner.read(text).teacher.path == str(shipped / "inside")
    converted = next(step for step in planner.steps(text) if step.record.get("path"))
    assert converted.record["path"] == str(shipped / "inside")
    for name, why in (("lost", "TypeError: .*"), ("renamed", "AttributeError: .*'fodler'")):
        said = f"teacher.path: the plug-in shipping.py gives no folder of the teacher '{name}': {why}$"
        with pytest.raises(MambabenchError, match=said):
            planner.read(text.replace("builtin:small", f"builtin:{name}"))
