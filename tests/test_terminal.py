"""What a user named is printed as it was named."""

import io
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from bench.demo import command as demo
from bench.quality import command as quality
from bench.speed import command as speed
from bench.study import command as study
from kv_cache.terminal import console
from loadtest.results import console as loadtest
from quant_methods import command as compress

NAMES = ("[bold]w4", "org/[red]m[/red]", "[/]", ":smile:")


def test_brackets_are_no_markup(capsys):
    table = Table(title=NAMES[1])
    table.add_column(NAMES[0])
    for name in NAMES:
        table.add_row(name)
    console(piped_width=100).print(table)
    found = capsys.readouterr().out
    assert all(name in found for name in NAMES)


@pytest.mark.parametrize("module", [demo, quality, speed, study, loadtest, compress])
def test_no_command_makes_a_console_of_its_own(module):
    """Rich's own understands brackets as markup, and fails on those that close nothing."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    made = [line for line in source.splitlines() if "Console(" in line and "markup=False" not in line]
    assert not made
    bars = [line for line in source.splitlines() if 'TextColumn("{task.description}"' in line and "markup" not in line]
    assert not bars


def test_a_task_is_described_as_it_is_named():
    stream = io.StringIO()
    shown = console()
    shown.file = stream
    with Progress(TextColumn("{task.description}", markup=False), console=shown) as bar:
        for name in NAMES:
            bar.add_task(name)
    assert all(name in stream.getvalue() for name in NAMES)
