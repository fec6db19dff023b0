"""The page: self-contained, escaped, made of whatever exists, quiet in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fabricated import ARMS, write_run

from eval import figures
from eval.report import write_report
from eval.results import read_run
from eval.summary import headline
from eval.table import load_results, summarise

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Links(HTMLParser):
    """Collects everything that a browser would fetch, and whether tags are closed."""

    VOID = ("meta", "link", "img", "br", "path", "use", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster") and value:
                self.fetched.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text())
    assert not links.open
    return links


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", examples=True)
    path = write_report(run)
    links = parsed(path)
    assert links.scripts == 0
    assert all(link.startswith(("data:", "#")) for link in links.fetched)
    text = path.read_text()
    assert "@import" not in text
    assert not re.findall(r"url\((?!#|data:)", text)
    assert text.count("<svg") == 3
    # A query image, and two answers per caption, for each arm's own files.
    assert text.count("data:image/jpeg;base64,") == 1 + 2 * len(ARMS)
    for name in ("scatter", "learning", "layers-inherited"):
        assert (run / "figures" / f"{name}.svg").read_text().startswith("<svg")


def test_the_page_says_what_was_run_and_what_came_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", examples=True)
    text = write_report(run).read_text()
    for shown in (
        "12,000 rendered scenes of 64 x 64 pixels",
        "100 for every arm",
        "1 h 06 min",
        "2 cores",
        "inherclip run made-up.yaml",
        "inherited, before training",
        "visual.body",
        "not smaller",
        "kind: inherited",
    ):
        assert shown in text
    assert "alert(" in text
    assert "<script" not in text


def test_the_headline_is_computed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    said = headline(read_run(run), summarise(load_results(run)))
    frame = load_results(run).set_index("arm")
    recall = frame[["scenes/i2t_r1", "scenes/t2i_r1"]].mean(axis=1)
    plain = said.sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert plain.startswith(f"The inherited model reaches {100 * recall['inherited']:.0f} % R@1")
    assert f"{100 * recall['inherited'] / recall['teacher']:.0f} % of its teacher's" in plain
    assert "with 40 % of the parameters" in plain
    assert "trained as long without inheritance: student_clipkd" in plain
    result = json.loads((run / "arms/student/eval.json").read_text()) | {"steps": 900}
    (run / "arms/student/eval.json").write_text(json.dumps(result))
    said = headline(read_run(run), summarise(load_results(run)))
    assert "as long" not in said.sentence


def test_small_recalls_are_told_apart_by_more_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in run.glob("arms/*/eval*.json"):
        content = json.loads(path.read_text())
        content["metrics"] |= {f"scenes/{d}_r{k}": k / 100 for d in ("i2t", "t2i") for k in (1, 5)}
        path.write_text(json.dumps(content))
    assert "R@10 on scenes" in headline(read_run(run), summarise(load_results(run))).sentence


@pytest.mark.parametrize("present", ["config", "one arm", "no heir", "broken"])
def test_the_page_is_made_of_whatever_exists(tmp_path: Path, present: str) -> None:
    run = write_run(tmp_path / "run", examples=present == "broken")
    if present == "config":
        shutil.rmtree(run / "arms")
    elif present == "one arm":
        for name in ("config.yaml", "run.json"):
            (run / name).unlink()
        for arm in list(ARMS)[:3]:
            shutil.rmtree(run / "arms" / arm)
    elif present == "no heir":
        shutil.rmtree(run / "arms/inherited")
    else:
        (run / "run.json").write_text("[")
        (run / "arms/teacher/examples.json").write_text("{}")
        (run / "arms/student/examples.json").write_text("[1]")
        (run / "arms/inherited/plan.json").write_text('{"layers": [{"name": 3}, "x"]}')
        (run / "arms/inherited/examples/1.jpg").unlink()
        with (run / "arms/student/train.jsonl").open("a") as log:
            log.write('{"step": 101, "loss": NaN, "loss/task": NaN}\n{"step": 102, "lo')
    path = write_report(run)
    parsed(path)
    text = path.read_text()
    expected = {
        "config": "No arm of this run has a result yet",
        "one arm": "student_clipkd reaches",
        "no heir": "inherited [missing]",
        "broken": "The inherited model",
    }
    assert expected[present] in text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", examples=True)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_figures_keep_to_the_colours_that_the_page_replaces() -> None:
    rising = np.stack([np.arange(30.0), np.arange(30.0)], axis=1)
    points = [figures.Point("a", 2e6, 0.0, 9), figures.Point("b", 1e6, 0.4, 1, before=True)]
    for svg in (
        figures.learning_curves({"a": (0, rising), "b": (9, rising[:2])}, "loss"),
        figures.quality_against_size(points, "R@1 (%)"),
        figures.kept_shares([("x", "conv", 1.0), ("y", "linear", 0.2)]),
    ):
        assert re.findall(r"#[0-9a-f]{6}\b", figures.themed(svg)) == []
        assert "DejaVu" not in figures.themed(svg)


def test_smoothing_keeps_length_and_mean() -> None:
    values = np.array([1.0, 1, 1, 5, 1, 1, 1])
    assert figures.smooth(values, 3)[3] == pytest.approx(7 / 3)
    assert figures.smooth(np.ones(9), 4) == pytest.approx(np.ones(9))
    assert figures.smooth(values, 0) == pytest.approx(values)
    assert len(figures.smooth(values[:2], 5)) == 2


def browse(page: Path, folder: Path) -> tuple[str, list[tuple[int, str]]]:
    """Open a page; returns the browser's log and its requests: (what kind, address)."""
    folder.mkdir()
    finished = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
            "--window-size=1200,2400", f"--log-net-log={folder / 'net.json'}",
            f"--screenshot={folder / 'page.png'}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    log = (folder / "net.json").read_text()
    found = re.findall(r'"traffic_annotation":(\d+),"url":"([^"]*)"', log)
    return finished.stderr, [(int(kind), url) for kind, url in found]


@pytest.mark.browser
def test_a_browser_shows_it_without_complaint(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    # The browser asks for things of its own accord. A page that does ask tells us the kind of
    # request that comes from pages, and that this test would notice one.
    control = tmp_path / "control.html"
    control.write_text(
        '<img src="http://elsewhere.invalid/x.png"><script>console.error("oh")</script>'
    )
    said, requests = browse(control, tmp_path / "control")
    kinds = {kind for kind, url in requests if "elsewhere.invalid" in url}
    assert kinds
    assert "CONSOLE" in said
    page = write_report(write_run(tmp_path / "run", examples=True))
    said, requests = browse(page, tmp_path / "page")
    assert "CONSOLE" not in said
    assert [url for kind, url in requests if kind in kinds] == []
    assert (tmp_path / "page" / "page.png").stat().st_size > 20_000
