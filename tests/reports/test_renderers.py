"""md, html and csv say the same; the page is self-contained; the command writes the files and names them."""

import csv
import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest
from click.testing import CliRunner
from mambabench import MambabenchError
from mambabench.harness import plugins
from mambabench.harness.statistics import Estimate
from mambabench.reports import cli
from mambabench.reports.cells import text
from mambabench.reports.csv import Csv
from mambabench.reports.html import Html, page
from mambabench.reports.markdown import Markdown
from mambabench.reports.options import NoOptions


class Page(HTMLParser):
    """Tables of a page as lists of rows, and every tag with its attributes."""

    def __init__(self):
        super().__init__()
        self.tables, self.tags, self.cell = [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def markdown_tables(source):
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\|\n)+", source, re.MULTILINE)]
    return [[re.split(r"(?<!\\) \| ", line[2:-2]) for i, line in enumerate(lines) if i != 1] for lines in tables]


def test_all_formats_contain_the_same_figures(make, report_of, tmp_path):
    report = report_of(make(seeds=(0, 1)))
    html = Page()
    html.feed(page(report))
    markdown = markdown_tables(Markdown(NoOptions()).render(report, tmp_path / "out").read_text())
    assert html.tables == markdown
    assert len(markdown) == len(report.sections) == 6
    folder = Csv(NoOptions()).render(report, tmp_path / "out")
    for section, (heads, *rows) in zip(report.sections, markdown, strict=True):
        with (folder / f"{section.name}.csv").open(newline="") as file:
            machine = list(csv.DictReader(file))
        assert len(machine) == len(rows)
        for record, row in zip(machine, rows, strict=True):
            for name, shown in zip(heads, row, strict=True):
                assert said(record, name) == shown, (section.name, name)


def said(record, name):
    """The printed text of a cell, made again from a row of a csv file."""
    cell, parts = record[name], {}
    for part, column in (("se", "s.e."), ("seed_se", "s.e. between seeds"), ("low", "low"), ("high", "high")):
        if record.get(f"{name} {column}"):
            parts[part] = float(record[f"{name} {column}"])
    if parts:
        return text(Estimate(value=float(cell), **parts))
    if re.fullmatch(r"-?\d+", cell):
        return text(int(cell))
    try:
        return text(float(cell), name)
    except ValueError:
        return text(cell)


def test_the_page_needs_nothing_else_and_runs_no_script(make, report_of):
    source = page(report_of(make(), with_plots=True))
    html = Page()
    html.feed(source)
    names = {tag for tag, _ in html.tags}
    assert not {"script", "link", "img", "iframe"} & names
    links = [attrs[name] for _, attrs in html.tags for name in ("href", "src", "xlink:href") if attrs.get(name)]
    assert all(link.startswith("#") for link in links)
    assert "prefers-color-scheme: dark" in source
    assert not re.search(r"url\((?!#)", source)


def test_plots_keep_their_text_and_take_the_page_s_colour(make, report_of):
    plots = {plot.name: plot.svg for plot in report_of(make(), with_plots=True).plots}
    assert set(plots) == {"quality-speed", "accepted-lengths"}
    assert re.search(r"<text[^>]*>half, lookup</text>", plots["quality-speed"])
    assert re.search(
        r"<text[^>]*>tokens|<text[^>]*>accepted length, tokens per round</text>", plots["accepted-lengths"]
    )
    for svg in plots.values():
        assert "currentColor" in svg
        assert "#ffffff" not in svg


def test_a_report_is_a_pure_function_of_its_stores(make, report_of):
    store = make()
    assert page(report_of(store, with_plots=True)) == page(report_of(store, with_plots=True, again=True))


def test_a_broken_row_is_seen_in_every_format(make, report_of, tmp_path):
    class Wrong:
        title, note = "Wrong", ""

        def frame(self, results):
            return pd.DataFrame([{"model": "half", "accepted length": 9.0, "k": 4}])

    report = report_of(make(), wrong=Wrong())
    message = "accepted length 9 is not between 1 and 5"
    assert message in Markdown(NoOptions()).render(report, tmp_path).read_text()
    assert message in (Csv(NoOptions()).render(report, tmp_path) / "wrong.csv").read_text()
    source = page(report)
    assert message in source
    assert '<tr class="broken">' in source


def test_what_stores_say_is_escaped(stores, tmp_path, report_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.step("teacher/-/tasks@seed0", state="error", reason="<script>alert(1)</script> | x")
    report = report_of(builder.write())
    html = Page()
    html.feed(Html(NoOptions()).render(report, tmp_path).read_text())
    assert "script" not in {tag for tag, _ in html.tags}
    source = Markdown(NoOptions()).render(report, tmp_path).read_text()
    assert "<script>" not in source
    assert "\\| x" in source


@pytest.fixture
def run(monkeypatch):
    def command(*arguments):
        return CliRunner().invoke(cli.report, [str(argument) for argument in arguments])

    return command


def test_the_command_prints_the_tables_and_ends_with_the_page(make, run):
    store = make()
    done = run(store)
    assert done.exit_code == 0, done.output
    lines = done.output.strip().splitlines()
    written = [store / "report" / name for name in ("report.md", "csv", "report.html")]
    assert lines[-3:] == [str(path) for path in written]
    assert all(path.exists() for path in written)
    for title in ("Quality", "Speed", "Acceptance of drafts", "Losslessness", "Cost", "Steps"):
        assert title in lines
    assert any(line.strip().startswith("half") and "±" in line for line in lines)


def test_the_command_writes_only_the_formats_and_tables_asked_for(make, run, tmp_path):
    done = run(make(), "--to", "csv", "--tables", "speed", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")] == [
        "csv/speed.csv"
    ]


def test_an_unknown_format_is_one_line_with_a_suggestion(make, run):
    done = run(make(), "--to", "htm")
    assert isinstance(done.exception, MambabenchError)
    assert str(done.exception) == "--to htm: unknown renderer 'htm'; did you mean 'html'?"


def test_a_registered_table_appears_in_the_report(make, run, monkeypatch, tmp_path):
    file = tmp_path / "house.py"
    file.write_text(
        "import pandas\nfrom dataclasses import dataclass\nfrom mambabench import Component, hookimpl\n"
        "@dataclass(frozen=True)\nclass Options:\n    pass\n"
        "class House:\n    title, note = 'House table', ''\n    def __init__(self, config):\n        pass\n"
        "    def frame(self, results):\n        return pandas.DataFrame([{'model': 'teacher', 'bricks': 41}])\n"
        "@hookimpl\ndef mambabench_components():\n"
        "    return [Component(kind='table', name='house', target=f'{__name__}:House', config=Options)]\n"
    )
    monkeypatch.setattr(cli, "registry", lambda: plugins.load([file]))
    done = run(make(), "--to", "html")
    assert done.exit_code == 0, done.output
    assert "House table" in done.output
    assert re.search(r"teacher\s+41", done.output)


def test_no_table_or_renderer_imports_torch(make, tmp_path):
    program = (
        "import sys; from pathlib import Path; from mambabench.reports import cli\n"
        f"cli.report(['{make()}', '--out', '{tmp_path}'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules; assert 'scipy.stats' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
