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
from mambabench.reports.terminal import KEYS, LONG, terminal_tables
from rich.console import Console


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
    assert len(markdown) == len(report.sections) == 7
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
    assert set(plots) == {"quality-speed", "accepted-lengths", "losses-align"}
    for name in ("half", "lookup"):
        assert re.search(rf"<text[^>]*>{name}</text>", plots["quality-speed"])
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


@pytest.mark.parametrize("width", [80, 100, 400])
def test_on_a_terminal_every_figure_stands_whole_beside_what_names_its_row(make, report_of, width):
    for section in report_of(make(seeds=(0, 1))).sections:
        console = Console(width=width)
        with console.capture() as captured:
            for table in terminal_tables(section, width):
                console.print(table)
        blocks = [block.splitlines() for block in re.split(rf"^{section.title}.*\n", captured.get(), flags=re.M)[1:]]
        assert all(len(line) <= width for block in blocks for line in block)
        assert len(blocks) == 1 or width < 400
        keys = [name for name in section.frame if name in KEYS]
        lines = [[" ".join(line.split()) for line in block] for block in blocks]
        for record in section.frame.to_dict("records"):
            row = {name: text(cell, name) for name, cell in record.items()}
            named = " ".join(row[name] for name in keys)
            of = [[line for line in block if line.startswith(f"{named} ")] for block in lines]
            assert all(of), (section.name, named)
            for name, shown in row.items():
                assert any(shown in line for block in of for line in block) or len(shown) > LONG, (section.name, name)


def test_the_first_block_of_a_narrow_terminal_has_the_figures_that_matter(make, report_of):
    wanted = {"quality": ["average %", "recovery %"], "speed": ["TPOT ms", "speed-up", "lossless"]}
    for section in report_of(make()).sections:
        first = [column.header.plain for column in terminal_tables(section, 100)[0].columns]
        assert set(wanted.get(section.name, [])) <= set(first)


def test_the_command_fits_its_tables_into_a_terminal(make, run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    done = run(make(), "--to", "csv")
    lines = re.sub(r"\x1b\[[\d;]*m", "", done.output).splitlines()
    assert "Speed, continued" in [line.strip() for line in lines]
    assert max(map(len, lines[:-1])) <= 100


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


def test_a_registered_table_whose_module_is_missing_is_one_line_of_the_report(make, run, monkeypatch, tmp_path):
    file = tmp_path / "house.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom mambabench import Component, hookimpl\n"
        "@dataclass(frozen=True)\nclass Options:\n    pass\n"
        "@hookimpl\ndef mambabench_components():\n"
        "    return [Component(kind='table', name='house', target='no_such_house:House', config=Options)]\n"
    )
    monkeypatch.setattr(cli, "registry", lambda: plugins.load([file]))
    done = run(make(), "--to", "md", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    line = "The table house could not be made: ModuleNotFoundError: No module named 'no_such_house'"
    assert [shown for shown in done.output.splitlines() if shown.startswith(line)]
    assert "Quality" in done.output
    assert "no_such_house" in (tmp_path / "report.md").read_text()


def test_no_table_or_renderer_imports_torch(make, tmp_path):
    program = (
        "import sys; from pathlib import Path; from mambabench.reports import cli\n"
        f"cli.report(['{make()}', '--out', '{tmp_path}'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules; assert 'scipy.stats' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
