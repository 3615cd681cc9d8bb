"""The scripts that compare methods on the demo data, without the runs themselves."""

import argparse

import pytest

from benchmarks import a2m2_parts
from benchmarks.demo_table import ROWS


def test_both_parts_are_compared_with_their_counterpart_in_rows_that_differ_in_one_thing_alone():
    changes = {row.name: set(row.changes) for row in ROWS if row.method == "a2m2"}

    for comparison in a2m2_parts.COMPARISONS:
        first, second = changes[comparison.first[1]], changes[comparison.second[1]]
        assert first < second, "the counterpart is the same row with a part switched off"
        assert len(second - first) == 1
    assert {comparison.part for comparison in a2m2_parts.COMPARISONS} == {"A2", "M2"}


def test_the_differences_are_those_of_the_runs_with_the_same_seed():
    names = {name for rows in a2m2_parts.ROW_OF.values() for name in rows}
    accuracies = {name: [90.0, 80.0, 70.0] for name in names}
    accuracies["A2M2 (our reconstruction)"] = [91.0, 81.5, 72.0]  # 1, 1.5 and 2 points ahead, which no spread hides
    options = argparse.Namespace(seeds=[1, 2, 3], train_episodes=300, test_episodes=1000)

    lines = a2m2_parts.table(accuracies, options).splitlines()

    [line] = [line for line in lines if line.startswith("| A2 | two scales")]
    assert "adaptive: 81.50 | fixed: 80.00 | +1.50 ± 0.29 | 3 of 3 | 0.250 |" in line


@pytest.mark.parametrize("seeds", [["1"], [str(seed) for seed in range(21)]])
def test_too_few_or_too_many_seeds_are_refused_before_anything_runs(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["a2m2_parts.py", "--runs", str(tmp_path / "runs"), "--seeds", *seeds])

    with pytest.raises(SystemExit) as ended:
        a2m2_parts.main()

    assert ended.value.code == 2
    assert f"2 to 20 seeds, found {len(seeds)}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
