"""The page, its plots, the table and the measures."""

import base64
import gc
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import exapt
from exapt.report import Interval, Page, PeakMemory, confusion, digest, show

plots = pytest.importorskip("exapt.report.plots")
pytest.importorskip("matplotlib", reason="plots need matplotlib")


def four():
    shown = [Interval(0.9, 0.85, 0.95), Interval(0.6, 0.5, 0.7)]
    return [
        plots.accuracy_against_parameters({"a": (100, shown[0]), "b": (100_000, shown[1])}),
        plots.curves({"a": ([1, 2], [3.0, 2.0]), "a, validation": ([2], [2.5])}, "step", "loss", "Training"),
        plots.grouped_bars(["old", "new"], {"a": shown, "b": shown[::-1]}, "Drop"),
        plots.confusion_matrix(confusion(["x", "y"], ["x", "x"], ["x", "y"]), ["x", "y"], "Confusion"),
    ]


def test_page_holds_its_pictures_and_escapes_text(tmp_path):
    page = Page("1 < 2").heading("a & b").text("<script>").points(["<i>"]).table(["m"], [["<td>"]], note="n & m")
    page.picture(plots.figure(four(), columns=2), "four plots")
    text = page.write(tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert "<i>" not in text
    assert "1 &lt; 2" in text
    assert "a &amp; b" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "the page refers to another file"
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert picture.startswith(b"\x89PNG")


def test_plots_show_the_numbers_they_were_given():
    made = plots.figure(four(), columns=2)
    points, lines, bars, grid = made.axes
    assert points.get_xscale() == "log"
    assert sorted(float(c.lines[0].get_ydata()[0]) for c in points.containers) == [60, 90]
    assert [list(line.get_ydata()) for line in lines.lines] == [[3.0, 2.0], [2.5]]
    assert lines.lines[0].get_color() == lines.lines[1].get_color()
    assert sorted(round(p.get_height()) for p in bars.patches) == [60, 60, 90, 90]
    assert bars.get_ylim()[0] == 0
    assert [t.get_text() for t in grid.texts] == ["1", "0", "1", "0"]


def test_table_prints_every_cell_and_refuses_ragged_rows(capsys):
    show(["method", "accuracy"], [["LoRA", "95.0 [93.0, 96.5]"]], title="On test", note="a note")
    out = capsys.readouterr().out
    assert all(x in out for x in ("method", "LoRA", "95.0 [93.0, 96.5]", "On test", "a note"))
    with pytest.raises(exapt.InputError, match="1 cells"):
        show(["a", "b"], [["x"]])


def test_table_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(["method", "n"], [["LoRA", "5"]])
    assert capsys.readouterr().out == "method  n\nLoRA    5\n"


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory() as idle:
        pass
    gc.collect()  # what other tests left may go at any time, and would count against the block
    with PeakMemory() as busy:
        np.ones(400_000_000 // 8).sum()
    assert busy.peak - busy.before > 300_000_000
    if not idle.since_start:
        assert idle.peak - idle.before < 20_000_000


def test_digest_sees_one_bit_and_detach_restores_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = digest(model)
    exapt.attach(model, exapt.LoRA(rank=2))
    assert digest(model) != before
    exapt.detach(model)
    assert digest(model) == before
    model[1].running_mean[3] = torch.nextafter(model[1].running_mean[3], torch.tensor(1.0))
    assert digest(model) != before


def test_importing_reports_imports_no_plotting():
    code = "import sys, exapt.report; print('matplotlib' in sys.modules, 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
