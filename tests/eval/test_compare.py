"""Tables: stable columns, no arm lost, spread over seeds, differences with intervals."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import ARMS, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from eval.columns import describe, metric_order
from eval.compare import compare_arms, write_comparison
from eval.results import read_run, write_result
from eval.statistics import paired_bootstrap
from eval.table import load_results, summarise


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_row_per_arm_and_a_column_per_metric(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_comparison(run)
    rows = rows_of(run / "compare.csv")
    assert [row["arm"] for row in rows] == ["teacher", "student_clipkd", "student", "inherited"]
    columns = list(rows[0])
    assert columns[:3] == ["arm", "seed", "state"]
    quality = [f"scenes/{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)] + ["shapes/top1"]
    before = ["before/scenes/i2t_r1", "before/scenes/t2i_r1", "before/shapes/top1"]
    cost = ["params", "macs", "latency_ms_b1", "images_per_s"]
    assert columns[3:] == [
        *quality, *before, *cost, "scenes/images", "steps", "checkpoint_sha256", "reason",
    ]  # fmt: skip
    by_arm = {row["arm"]: row for row in rows}
    written = json.loads((run / "arms/student/eval.json").read_text())
    for name, value in written["metrics"].items():
        assert float(by_arm["student"][name]) == value
    assert by_arm["inherited"]["before/scenes/i2t_r1"] == "0.5"
    assert by_arm["teacher"]["before/scenes/i2t_r1"] == ""
    assert {row["steps"] for row in rows} == {"100"}


@given(seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_order_of_columns_does_not_depend_on_the_order_found(seed: int) -> None:
    names = ["b/t2i_r1", "b/i2t_r10", "a/top5", "a/top1", "params", "extra", "a/images", "z/other"]
    names += ["before/b/t2i_r1", "macs"]
    shuffled = random.Random(seed).sample(names, len(names))
    assert metric_order(shuffled, ["b"]) == [
        "b/i2t_r10", "b/t2i_r1", "a/top1", "a/top5", "z/other", "before/b/t2i_r1",
        "params", "macs", "extra", "a/images",
    ]  # fmt: skip


def test_no_arm_is_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("arms:", "arms:\n  skipped: {kind: scratch}"))
    (run / "arms/student/eval.json").unlink()
    (run / "arms/student_clipkd/eval.json").write_text('{"metrics": {"sce')
    for name, state in (("boom", "failed"), ("stopped", "cancelled")):
        (run / f"arms/{name}").mkdir()
        status = {"state": state, "reason": f"why {name}"}
        (run / f"arms/{name}/status.json").write_text(json.dumps(status))
    write_comparison(run)
    states = {row["arm"]: (row["state"], row["reason"]) for row in rows_of(run / "compare.csv")}
    assert states == {
        "teacher": ("done", ""),
        "inherited": ("done", ""),
        "skipped": ("missing", "not run"),
        "student": ("unfinished", "last logged step 100"),
        "student_clipkd": ("failed", "eval.json cannot be read"),
        "boom": ("failed", "why boom"),
        "stopped": ("cancelled", "why stopped"),
    }
    text = (run / "compare.md").read_text()
    for shown in ("boom [failed]", "stopped [cancelled]", "skipped [missing]", "why stopped"):
        assert shown in text


def test_a_run_without_any_result_is_still_a_table(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\narms: {a: {}, b: {}}\n")
    write_comparison(tmp_path)
    assert [row["state"] for row in rows_of(tmp_path / "compare.csv")] == ["missing", "missing"]
    assert "b [missing]" in (tmp_path / "compare.md").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run"):
            write_comparison(path)


def test_seeds_become_mean_and_spread(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds=3)
    (run / "arms/student-seed2/eval.json").unlink()
    frame = load_results(run)
    assert len(frame) == 12
    assert frame.loc[frame["arm"] == "teacher", "seed"].tolist() == [0, 1, 2]
    lines = {(line.arm, line.before): line for line in summarise(frame)}
    teacher = frame.loc[frame["arm"] == "teacher", "scenes/i2t_r1"]
    value = lines["teacher", False].values["scenes/i2t_r1"]
    assert value.mean == pytest.approx(np.mean(teacher))
    assert value.spread == pytest.approx(np.std(teacher, ddof=1))
    student = lines["student", False]
    assert (student.state, student.seeds) == ("done", 2)
    assert "seed 2 unfinished" in student.reason
    assert ("inherited", True) in lines
    text = write_comparison(run).read_text()
    assert f"{100 * value.mean:.1f} ±{100 * (value.spread or 0):.1f}" in text


def test_the_table_lines_up_and_speaks_in_units(tmp_path: Path) -> None:
    text = write_comparison(write_run(tmp_path / "run")).read_text()
    tables = text.split("\n\n")
    rows = [line for line in tables[0].splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert max(map(len, rows)) <= 130
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows}
    assert cells["arm"][-4:] == ["params M", "GMAC", "ms/pair", "x teacher"]
    assert cells["inherited"][-4:] == ["0.80", "0.040", "7.5", "0.400"]
    assert cells["inherited, before training"][:3] == ["50.0", "40.0", "30.0"]


def test_differences_are_paired(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    contrasts = {(x.second, x.metric): x for x in compare_arms(run)}
    assert {second for second, _ in contrasts} == set(ARMS) - {"inherited"}
    assert {m for _, m in contrasts} == {"scenes/i2t_r1", "scenes/t2i_r1", "shapes/top1"}
    found = contrasts["student", "scenes/t2i_r1"].difference
    frame = load_results(run).set_index("arm")["scenes/t2i_r1"]
    assert found.value == pytest.approx(frame["inherited"] - frame["student"])
    assert found.low < found.value < found.high
    assert found.certain


def test_arms_that_answered_other_queries_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "arms/student/queries.npz"
    with np.load(path) as arrays:
        fewer = {name: arrays[name][:-3] for name in arrays.files}
    np.savez_compressed(path, allow_pickle=False, **fewer)
    assert {x.second for x in compare_arms(read_run(run))} == {"teacher", "student_clipkd"}


def test_the_interval_covers_the_truth_and_is_wider_for_whole_images() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        first = generator.random(300) < 0.6
        second = generator.random(300) < 0.5
        found = paired_bootstrap(first, second, draws=400, seed=trial)
        covered += found.low <= 0.1 <= found.high
    assert 88 <= covered <= 100
    first = np.repeat(generator.random(100) < 0.6, 5)
    second = np.repeat(generator.random(100) < 0.5, 5)
    owner = np.repeat(np.arange(100), 5)
    apart, together = paired_bootstrap(first, second), paired_bootstrap(first, second, owner)
    assert together.high - together.low > 1.8 * (apart.high - apart.low)
    same = paired_bootstrap(first, first, owner)
    assert (same.value, same.low, same.high, same.certain) == (0, 0, 0, False)
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap(first, second[1:])


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "arm" / "eval.json"
    write_result(
        path, arm="a", checkpoint_sha256="ab", metrics={"s/top1": 0.5}, seed=3, steps=7, data="d"
    )
    content = json.loads(path.read_text())
    assert content["metrics"] == {"s/top1": 0.5}
    assert (content["arm"], content["stage"], content["seed"], content["steps"]) == (
        "a", "final", 3, 7,
    )  # fmt: skip
    assert content["data"] == "d"
    assert {"python", "torch", "time"} <= set(content["environment"])
    with pytest.raises(ValueError, match="not finite: s/top1"):
        write_result(path, arm="a", checkpoint_sha256="ab", metrics={"s/top1": float("nan")})
    assert json.loads(path.read_text()) == content


def test_numbers_are_shown_in_units_for_people() -> None:
    assert describe("set/i2t_r1").show(0.1234) == "12.3"
    assert describe("params").show(119_690_000) == "119.69"
    assert describe("macs").show(12.67e9, 1e7) == "12.670 ±0.010"
    assert describe("unheard_of").show(0.12345) == "0.1235"
    assert describe("set/images").show(1000.0) == "1000"


def test_the_frame_keeps_whole_numbers_whole(tmp_path: Path) -> None:
    frame = load_results(write_run(tmp_path / "run"))
    assert frame["seed"].dtype == pd.Int64Dtype()
    assert frame["steps"].dtype == pd.Int64Dtype()
