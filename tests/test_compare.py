"""Comparisons of test runs: refused for different queries, correct for the same queries."""

import itertools
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from run.compare import main
from run.comparison import DIGESTS, FIELDS
from run.comparison_page import MAX_QUERIES
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import trained
from tests.helpers.toy_runs import toy_run
from utils.errors import UserError


def compared(tmp_path: Path, *words: str) -> dict[str, Any]:
    """Returns the numbers that a comparison writes."""
    path = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
    main([*words, "--json", str(path)])
    return json.loads(path.read_text())


# Numbers


def test_a_toy_case_equals_numbers_computed_by_hand(tmp_path, capsys):
    first = toy_run(tmp_path / "a", [[1, 1], [1, 0], [0, 0], [1, 0]])  # 4 of 8
    second = toy_run(tmp_path / "b", [[1, 1], [1, 1], [1, 1], [0, 1]], label="clipspm")  # 7 of 8
    summary = compared(tmp_path, first, second)
    assert [side["accuracy"] for side in summary["sides"]] == [50.0, 87.5]
    [comparison] = summary["comparisons"]
    assert comparison["difference"] == 37.5
    # Differences of the episodes: 0, 50, 100 and 0 %, deviation 47.87; without the zeros two signs, both plus.
    assert comparison["over_episodes"]["interval_95"] == pytest.approx(1.959964 * 47.871 / 2, rel=1e-4)
    assert comparison["over_episodes"]["p_value"] == 0.5
    assert comparison["over_videos"]["interval_95"] >= comparison["over_episodes"]["interval_95"]
    assert comparison["wins"] == {"A": 0, "B": 1, "equal": 1}
    assert [(row["class"], row["A"], row["B"]) for row in comparison["classes"]] == [("jump", 75, 75), ("run", 25, 100)]
    assert comparison["only_right"] == {"A": 1, "B": 4}
    assert comparison["videos"]["A"] == [{"video": "jump/0", "only_right": 1, "queries": 1}]
    assert [row["video"] for row in comparison["videos"]["B"]] == ["jump/3", "run/0", "run/2", "run/3"]
    printed = capsys.readouterr().out
    for part in (
        "B - A: +37.50 points",
        "p = 0.5",
        "A ahead in 0, B in 1, equal in 1",
        "only A right: 1, only B right: 4",
    ):
        assert part in printed


def test_a_video_is_counted_in_each_episode_with_it_as_query(tmp_path, capsys):
    query = [[3, 5], [3, 6], [3, 7], [0, 4]]
    first = toy_run(tmp_path / "a", [[1, 0], [1, 0], [0, 0], [1, 0]], query=query)
    second = toy_run(tmp_path / "b", [[0, 0], [0, 0], [0, 0], [0, 0]], query=query)
    [comparison] = compared(tmp_path, first, second)["comparisons"]
    assert comparison["videos"]["A"] == [
        {"video": "jump/3", "only_right": 2, "queries": 3},
        {"video": "jump/0", "only_right": 1, "queries": 1},
    ]
    assert re.search(r"jump/3 +in 2 of 3 ", capsys.readouterr().out)


def test_two_identical_runs_do_not_differ(tmp_path):
    answers = [[1, 1], [1, 0], [0, 0], [1, 0]]
    runs = [toy_run(tmp_path / name, answers) for name in "ab"]
    summary = compared(tmp_path, *runs)
    [comparison], [note] = summary["comparisons"], summary["notes"]
    assert "A and B gave every query the same scores" in note
    assert comparison["difference"] == 0
    for source in ("over_episodes", "over_videos"):
        assert comparison[source] == {"interval_95": 0, "p_value": 1}
    assert comparison["wins"] == {"A": 0, "B": 0, "equal": 2}
    assert comparison["only_right"] == {"A": 0, "B": 0}


def test_every_side_is_compared_with_the_first(tmp_path):
    runs = [toy_run(tmp_path / str(n), [[1] * 2] * n + [[0] * 2] * (4 - n)) for n in (2, 3, 4)]
    comparisons = compared(tmp_path, *runs)["comparisons"]
    assert [comparison["sides"] for comparison in comparisons] == [["A", "B"], ["A", "C"]]
    assert [comparison["difference"] for comparison in comparisons] == [25, 50]


def test_seeds_are_averaged_and_compared_in_pairs(tmp_path):
    right = {  # per seed: 2, 4 and 6 of 8 against 4, 5 and 8
        1: ([[1, 1], [0, 0], [0, 0], [0, 0]], [[1, 1], [1, 1], [0, 0], [0, 0]]),
        2: ([[1, 1], [1, 1], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 0], [0, 0]]),
        3: ([[1, 1], [1, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [1, 1], [1, 1]]),
    }
    first = [toy_run(tmp_path / f"a{seed}", pair[0], seed) for seed, pair in right.items()]
    second = [toy_run(tmp_path / f"b{seed}", pair[1], seed, label="clipspm") for seed, pair in right.items()]
    summary = compared(tmp_path, *first, "vs", *reversed(second))
    assert [side["accuracy"] for side in summary["sides"]] == pytest.approx([50, 100 * 17 / 24])
    assert summary["sides"][0]["standard_deviation_over_runs"] == pytest.approx(25)
    [comparison] = summary["comparisons"]
    seeds = comparison["over_seeds"]
    assert seeds["differences"] == {"1": 25, "2": 12.5, "3": 25}
    assert seeds["standard_deviation"] == pytest.approx(np.std([25, 12.5, 25], ddof=1))
    assert seeds["p_value"] == seeds["least_p_value"] == 0.25
    # The last episode is right under one seed of B and none of A, so no query is right under all seeds of B alone.
    assert comparison["only_right"] == {"A": 0, "B": 0}


def test_unpaired_training_seeds_have_no_difference_over_seeds(tmp_path):
    runs = [toy_run(tmp_path / str(seed), [[1, 0]] * 4, seed) for seed in (1, 2, 3)]
    [comparison] = compared(tmp_path, *runs[:2], "vs", *runs[1:])["comparisons"]
    assert comparison["over_seeds"] is None


# Refused


@pytest.mark.parametrize("field", [*FIELDS, *DIGESTS])
def test_runs_of_different_tasks_are_refused_with_the_differing_field(field, tmp_path):
    other = {"dataset": "hmdb51", "split": "val", "protocol": "transductive", **dict.fromkeys(DIGESTS, "f" * 64)}
    first = toy_run(tmp_path / "a", [[1, 1]] * 4)
    second = toy_run(tmp_path / "b", [[1, 1]] * 4, **{field: other.get(field, 7)})
    with pytest.raises(UserError) as caught:
        main([first, second])
    assert field in str(caught.value)
    has_its_answers = field not in ("protocol", "episodes", "way")
    assert (first in str(caught.value)) == has_its_answers
    assert second in str(caught.value)
    assert not [name for name in FIELDS if name != field and f"{name} is" in str(caught.value)]


def test_runs_of_two_methods_on_one_side_are_refused(tmp_path):
    runs = [toy_run(tmp_path / label, [[1, 1]] * 4, label=label) for label in ("otam", "clipspm")]
    with pytest.raises(UserError, match=r"otam.*clipspm"):
        main([*runs, "vs", runs[0]])


@pytest.mark.parametrize("words", [["A"], ["A", "vs"], ["vs", "A"], ["A", "vs", "vs", "A"]])
def test_a_single_side_is_refused(words, tmp_path):
    run = toy_run(tmp_path / "A", [[1, 1]] * 4)
    with pytest.raises(UserError, match="vs"):
        main([run if word == "A" else word for word in words])


def test_paths_without_a_single_result_are_named(tmp_path):
    run = toy_run(tmp_path / "a", [[1, 1]] * 4)
    with pytest.raises(UserError, match=r"nowhere"):
        main([run, str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/results\.json is missing"):
        main([run, str(tmp_path / "empty")])
    for content in (b"", b"[]", b'{"accuracy": 1}', b"\xff"):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(UserError, match=r"other\.json"):
            main([run, str(tmp_path / "other.json")])
    toy_run(tmp_path / "a", [[1, 1]] * 4)
    with pytest.raises(UserError, match=r"results\.json, results_2\.json"):
        main([run, run])
    main([f"{run}/results.json", f"{run}/results_2.json"])
    (tmp_path / "a" / "answers_2.npz").unlink()
    with pytest.raises(UserError, match=r"answers_2\.npz"):
        main([f"{run}/results.json", f"{run}/results_2.json"])


def test_files_that_exist_are_not_overwritten_and_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("run.compare.load_sides", lambda paths: pytest.fail("the runs were read"))
    (tmp_path / "mine").write_text("mine")
    for option, path in itertools.product(("--json", "--html"), ("mine", "mine/below/file")):
        with pytest.raises(UserError, match="mine"):
            main([str(tmp_path / "a"), str(tmp_path / "b"), option, str(tmp_path / path)])
        assert (tmp_path / "mine").read_text() == "mine"


def test_other_differences_than_the_task_are_reported(tmp_path, capsys):
    runs = [toy_run(tmp_path / on, [[1, 1]] * 4, checkpoint_selected_on=on) for on in ("val", "test")]
    main(runs)
    assert "note: checkpoint_selected_on differs (A: val, B: test)" in capsys.readouterr().out


# End to end


class _Page(HTMLParser):
    """Sources of images and the text of a page; void tags aside, every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_queries_that_only_one_method_gets_right(
    tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, changes in (("spm", []), ("plain", ["MODEL.SPM.ENABLED=false", "MODEL.HSMR.ENABLED=false"])):
        trained(tiny_dataset, tmp_path / name, *changes, "TEST.TEST_EPISODES=30", "TRAIN.VAL_FREQ=0").test()
        runs.append(str(tmp_path / name))
    capsys.readouterr()
    main([*runs, "--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "numbers.json")])
    summary = json.loads((tmp_path / "numbers.json").read_text())
    [comparison] = summary["comparisons"]
    for side, run in zip(summary["sides"], runs, strict=True):
        results = json.loads(Path(run, "results.json").read_text())
        for key in ("accuracy", "interval_95", "interval_95_videos"):
            assert side[key] == pytest.approx(results[key])
    assert sum(comparison["only_right"].values()) > 0
    text = (tmp_path / "page.html").read_text()
    page = _Page(text)
    assert page.open == []
    shown = [videos[:MAX_QUERIES] for videos in comparison["videos"].values()]
    assert len(page.images) == 3 * sum(map(len, shown))
    assert not re.search(r"(src|href)=.(?!data:)", text)
    picture = Image.open(BytesIO(b64decode(page.images[0].partition("base64,")[2])))
    assert picture.size == (4 * 32, 32)
    for side in shown:
        assert all(row["video"] in text for row in side)


def test_a_page_is_refused_for_other_videos_than_the_results(own, tmp_path):
    for name in ("a", "b"):
        trained(own, tmp_path / name, "TRAIN.TRAIN_EPISODES=2", "TRAIN.VAL_FREQ=0").test()
    video = next((own.videos / "test_action_0").iterdir())
    video.rename(video.with_name("another.mp4"))
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "page.html")]
    with pytest.raises(UserError, match=r"not those of the results"):
        main(words)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    del results["config"]
    (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"no config"):
        main(words)
    assert not (tmp_path / "page.html").exists()
