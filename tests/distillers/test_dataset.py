import json
import lzma
import time

import pytest
from mambabench.distillers.data_configs import DatasetConfig, MixConfig, find_commit
from mambabench.distillers.dataset import DatasetSource, Mix, read_file, read_folder
from mambabench.distillers.rows import Reader
from mambabench.harness.documents import read_documents, read_preferences
from mambabench.harness.interfaces import MambabenchError, Unsupported

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
AGAIN, BYE = {"role": "user", "content": "Go"}, {"role": "assistant", "content": "Bye"}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def records(row, **options):
    return list(Reader(DatasetConfig(path="x", **options), list(row), "x").records(row, 1))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, [{"text": "a"}]),
        ({"text": " "}, []),
        ({"prompt": "a", "completion": "b"}, [{"prompt": "a\n\n", "completion": "b"}]),
        ({"instruction": "a", "input": "x", "output": "b"}, [{"prompt": "a\n\nx\n\n", "completion": "b"}]),
        ({"instruction": "a", "input": "", "output": "b"}, [{"prompt": "a\n\n", "completion": "b"}]),
        ({"input": "a", "output": "b"}, [{"prompt": "a\n\n", "completion": "b"}]),
        ({"conversations": SHAREGPT}, [{"messages": [USER, BOT]}]),
        ({"prompt": "Hi", "messages": [USER, BOT]}, [{"messages": [USER, BOT]}]),
        ({"messages": [USER, BOT, AGAIN, BYE]}, [{"messages": [USER, BOT]}, {"messages": [USER, BOT, AGAIN, BYE]}]),
        ({"messages": [USER, BOT, AGAIN]}, [{"messages": [USER, BOT]}]),
        ({"messages": [USER]}, []),
        (
            {"system": "S", "question": "a", "chosen": "b", "rejected": "c"},
            [{"prompt": "S\n\na\n\n", "chosen": "b", "rejected": "c"}],
        ),
        ({"question": "a", "chosen": "b", "rejected": "b"}, []),
        (
            {"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, BYE]},
            [{"prompt": [USER], "chosen": [BOT], "rejected": [BYE]}],
        ),
        (
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": BYE},
            [{"prompt": [USER], "chosen": [BOT], "rejected": [BYE]}],
        ),
        ({"chosen": [USER, BOT], "rejected": [AGAIN, BYE]}, []),
    ],
)
def test_usual_columns_are_known(row, expected):
    assert records(row) == expected


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a", "body": "b"}, {"text_column": "body"}, [{"text": "b"}]),
        ({"text": "a", "q": "b", "a": "c"}, {"prompt_column": "q", "completion_column": "a"}, "c"),
        ({"instruction": "a", "output": "b", "chosen": "c", "rejected": "d"}, {"form": "completion"}, "b"),
        ({"prompt": "Hi", "completion": "Hello"}, {"chat": "messages"}, [{"messages": [USER, BOT]}]),
        ({"messages": [USER, BOT, AGAIN, BYE]}, {"turns": "last"}, [{"messages": [USER, BOT, AGAIN, BYE]}]),
        ({"messages": [USER, BOT, AGAIN, BYE]}, {"turns": "first"}, [{"messages": [USER, BOT]}]),
        (
            {"messages": [USER, BOT, AGAIN, BYE, AGAIN]},
            {"learn": "all"},
            [{"messages": [USER, BOT, AGAIN, BYE], "whole": True}],
        ),
        ({"messages": [USER, BOT]}, {"learn": "all", "chat": "plain"}, [{"text": "User: Hi\n\nAssistant: Hello"}]),
        ({"prompt": "Hi", "completion": "Hello"}, {"learn": "all"}, [{"text": "Hi\n\nHello"}]),
        ({"messages": [USER, BOT]}, {"chat": "plain"}, [{"prompt": "User: Hi\n\nAssistant:", "completion": " Hello"}]),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"},
            {"chat": "messages"},
            [{"prompt": [USER], "chosen": [BOT], "rejected": [BYE]}],
        ),
        (
            {"chosen": [USER, BOT], "rejected": [USER, BYE]},
            {"chat": "plain"},
            [{"prompt": "User: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Bye"}],
        ),
    ],
)
def test_options_say_what_columns_are_and_how_chats_are_written(row, options, expected):
    made = records(row, **options)
    assert (made if isinstance(expected, list) else made[0]["completion"]) == expected


@pytest.mark.parametrize(
    ("row", "options", "complaint"),
    [
        ({"body": "a"}, {}, "the columns body are none of the usual ones"),
        ({"text": "a"}, {"text_column": "txt"}, "no column 'txt'; there are text"),
        ({"text": "a"}, {"form": "chat"}, "no column for messages; name it as `messages_column`"),
        ({"text": 3}, {}, "column 'text' holds int"),
        ({"messages": [{"role": "me", "content": "a"}]}, {}, "a turn of a chat has the role 'me'"),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            {},
            r"a turn of a chat has the role \['user'\]; known: sys",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            {},
            "content of .* is list, where",
        ),
        ({"messages": ["Hi"]}, {}, "a turn of a chat is str"),
        ({"messages": 5}, {}, "a chat is int, where a list of turns is wanted"),
        ({"messages": "Hi"}, {}, "a chat is str, where a list of turns is wanted"),
    ],
)
def test_what_a_row_lacks_is_said(row, options, complaint):
    with pytest.raises(MambabenchError, match=complaint):
        records(row, **options)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.xz", "a.jsonl.xz", "a.parquet"])
def test_each_kind_of_file_has_the_same_rows(tmp_path, name):
    rows, file = [{"messages": [USER, BOT]}, {"messages": [AGAIN, BYE]}], tmp_path / name
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        text = json.dumps(rows) if ".jsonl" not in name else "\n".join(map(json.dumps, rows))
        file.write_bytes(lzma.compress(text.encode()) if name.endswith("xz") else text.encode())
    assert list(read_file(file)) == rows


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "[1]", "rows are JSON objects"),
        ("a.json", "[", "not JSON"),
        ("a.jsonl", '{"text": "a"}\n[]\n', "a.jsonl:2: rows are JSON objects|a.jsonl:2"),
        ("a.jsonl", '{"text": "\xe4"}', "not UTF-8 text"),
        ("a.json", '[{"text": "\xe4"}]', "not UTF-8 text"),
        ("a.txt", "\xe4", "not UTF-8 text"),
        ("a.jsonl.xz", "a", "not a whole .xz file"),
        ("a.txt.xz", lzma.compress(b"a" * 99)[:-9].decode("latin-1"), "not a whole .xz file"),
        ("a.parquet", "a", "not parquet"),
        ("a.csv", "a", "unknown kind of data"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(MambabenchError, match=complaint) as error:
        list(read_file(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))


def test_the_row_that_is_at_fault_is_named_by_its_number(tmp_path, make_job):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    with pytest.raises(MambabenchError, match=r"^a\.jsonl: row 3: column 'text' holds int"):
        DatasetSource(DatasetConfig(path="a.jsonl", first=1)).write(make_job(data={"a.jsonl": file}))


def test_a_parquet_file_with_damage_inside_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a" * 100}] * 9), file)
    content = bytearray(file.read_bytes())
    content[20:60] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(MambabenchError, match=r"^.*a\.parquet: not parquet"):
        list(read_file(file))


@pytest.mark.parametrize("content", [b'{"text": "\xe4"}\n', b"{bad\n"])
def test_a_folder_with_a_file_that_cannot_be_read_is_named(tmp_path, content):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(content)
    with pytest.raises(MambabenchError, match=r"^.*data: "):
        list(read_folder(tmp_path / "data", DatasetConfig(path="data")))


def test_rows_become_documents_that_can_be_read(tmp_path, make_job):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9)) + '{"text": null}\n')
    job = make_job(data={"a.jsonl": file})
    DatasetSource(DatasetConfig(path="a.jsonl", first=2)).write(job)
    assert [document.text for document in read_documents(job.out)] == list("2345678")
    assert job.emit.facts == {"rows": 8, "rows_left_out": 1, "documents": 7}
    job = make_job("few", data={"a.jsonl": file})
    DatasetSource(DatasetConfig(path="a.jsonl", first=2, limit=3)).write(job)
    assert [document.text for document in read_documents(job.out)] == list("234")


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_folders_of_data_sets_are_read(tmp_path, make_job, kind):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, BYE]}]
    folder, made = tmp_path / "set", datasets.Dataset.from_list(rows)
    if kind == "saved":
        datasets.DatasetDict({"train": made}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        made.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    job = make_job(data={"set": folder})
    DatasetSource(DatasetConfig(path="set")).write(job)
    (pair,) = read_preferences(job.out)
    assert (pair.messages[0].content, pair.chosen, pair.rejected) == ("Hi", "Hello", "Bye")
    with pytest.raises(MambabenchError, match="test"):
        DatasetSource(DatasetConfig(path="set", split="test")).write(make_job("other", data={"set": folder}))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    find_commit.cache_clear()
    return tmp_path / "hub"


def test_a_data_set_that_cannot_be_had_is_unsupported_at_once(hub, make_job):
    begun = time.perf_counter()
    config = DatasetConfig(name="nobody/nothing")
    assert config.fingerprint() == ""
    with pytest.raises(Unsupported, match="nobody/nothing: not in the local cache, and the hub cannot be reached"):
        DatasetSource(config).write(make_job())
    assert time.perf_counter() - begun < 5


def test_a_cached_data_set_needs_no_network_and_has_its_commit_as_fingerprint(hub, make_job):
    pytest.importorskip("datasets")
    commit = "0123456789" * 4
    snapshot = hub / "datasets--some--set" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (hub / "datasets--some--set" / "refs").mkdir()
    (hub / "datasets--some--set" / "refs" / "main").write_text(commit)
    config, job = DatasetConfig(name="some/set"), make_job()
    assert config.fingerprint() == DatasetConfig(name="some/set", revision=commit).fingerprint() == commit
    DatasetSource(config).write(job)
    assert [document.text for document in read_documents(job.out)] == ["a"]
    assert job.emit.facts["data_commit"] == commit


def test_a_mix_has_all_documents_in_the_order_of_its_seed(tmp_path, make_job):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(20)))
    (tmp_path / "b.txt").write_text("b0\n<|endoftext|>\nb1\n")
    orders = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        job = make_job(name, data={"a": tmp_path / "a.jsonl", "b": tmp_path / "b.txt"})
        Mix(MixConfig(data=("a", "b"), seed=seed)).write(job)
        orders.append([document.text for document in read_documents(job.out)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted([f"a{i}" for i in range(20)] + ["b0", "b1"])


@pytest.fixture
def plan_of(tmp_path, teacher):
    """Expands a plan that perplexity is measured on data `text`, in its own folder; returns the step that makes it."""
    from mambabench.harness.keys import Fingerprints
    from mambabench.harness.plan import read_plan
    from mambabench.harness.plugins import registry
    from mambabench.harness.steps import expand

    def make(entry):
        (tmp_path / "plan.toml").write_text(
            f'teacher = {{ path = "{teacher.path}" }}\n[data]\ntext = {entry}\n'
            '[suites.perplexity]\nuse = "perplexity"\ndata = "text"\n'
        )
        loaded = registry()
        plan = read_plan(tmp_path / "plan.toml", loaded)
        (step,) = (step for step in expand(plan, loaded, Fingerprints(tmp_path / "cache"), {}) if step.kind == "data")
        return step

    return make


def test_a_plan_knows_data_by_the_content_of_files(tmp_path, plan_of):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    short, long = plan_of('"a.json"'), plan_of('{ use = "dataset", path = "b.json" }')
    assert short.key == long.key
    assert short.record["data"]["a.json"]["file"] == str(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('[{"text": "b"}]')
    assert plan_of('"b.json"').key != short.key
    with pytest.raises(MambabenchError, match=r"data.text.path: there is no file .*c.json"):
        plan_of('{ use = "dataset", path = "c.json" }')


def test_a_plan_knows_data_of_the_hub_by_their_commit(hub, plan_of):
    keys = [plan_of(entry).key for entry in ('"hf:some/set"', '{ use = "dataset", name = "some/set" }')]
    assert keys[0] == keys[1]
    commit = "0123456789" * 4
    (hub / "datasets--some--set" / "snapshots" / commit).mkdir(parents=True)
    (hub / "datasets--some--set" / "refs").mkdir()
    (hub / "datasets--some--set" / "refs" / "main").write_text(commit)
    find_commit.cache_clear()
    assert plan_of('"hf:some/set"').key != keys[0]


def test_real_instructions_and_preferences_are_read(shared, make_job):
    folder = shared / "data" / "instruct"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand")
    found = {}
    for name, form, read in (
        ("alpaca_en_demo.json", "auto", read_documents),
        ("dpo_en_demo.json", "auto", read_preferences),
        ("instruction-data-with-preference.json", "auto", read_preferences),
        ("instruction-data-with-preference.json", "completion", read_documents),
    ):
        job = make_job(f"{name}-{form}", data={"file": folder / name})
        DatasetSource(DatasetConfig(path="file", form=form)).write(job)
        found[name, form] = len(list(read(job.out))) + job.emit.facts["rows_left_out"]
    assert list(found.values()) == [999, 299, 1100, 1100]
