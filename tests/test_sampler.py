"""Episodes: a pure function of seed, split and number, and drawn fairly."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.sampler import EpisodeSampler, EpisodeSpec, generator
from episodes.splits import ClassEntry, SplitIndex
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def make_index(videos_of_class: Sequence[int] = (12,) * 10, split: str = "test", dataset: str = "tiny") -> SplitIndex:
    """Returns an index with this number of videos in each class; no files exist on disk."""
    classes = tuple(ClassEntry(f"class_{c}", f"class {c}", count) for c, count in enumerate(videos_of_class))
    names = tuple(f"class_{c}/video_{v}" for c, count in enumerate(videos_of_class) for v in range(count))
    return SplitIndex(
        dataset=dataset,
        split=split,
        root=Path("videos"),
        classes=classes,
        video_names=names,
        video_paths=tuple(f"{name}.mp4" for name in names),
        class_of_video=np.repeat(np.arange(len(videos_of_class)), videos_of_class),
        horizontal_flip=True,
    )


def make_sampler(way: int = 5, shot: int = 2, queries: int = 3, seed: int = 6, split: str = "test") -> EpisodeSampler:
    return EpisodeSampler(make_index(split=split), way, shot, queries, seed)


def as_lists(spec: EpisodeSpec) -> list:
    """Returns an episode in a form that compares and writes to JSON."""
    return [spec.index, *(part.tolist() for part in (spec.class_ids, spec.support, spec.query, spec.query_labels))]


def chi_square(counts: np.ndarray, draws: int, probability: float) -> float:
    """Returns chi-square of the counts of C items, in standard deviations from its mean; below 4 is unremarkable.

    Args:
        counts: how often each item was drawn.
        draws: number of draws, each of several items without replacement.
        probability: of an item in a draw.
    """
    # Counts drawn without repeats vary less than independent ones; their sum is fixed.
    freedom = len(counts) - 1
    variance = draws * probability * (1 - probability) * len(counts) / freedom
    statistic = float(((counts - draws * probability) ** 2 / variance).sum())
    return (statistic - freedom) / (2 * freedom) ** 0.5


# --- purity -----------------------------------------------------------------------------------------------


def test_an_episode_depends_on_neither_order_nor_object() -> None:
    sampler = make_sampler()
    forwards = [as_lists(sampler.episode(i)) for i in range(30)]
    backwards = [as_lists(sampler.episode(i)) for i in reversed(range(30))]
    fresh = [as_lists(make_sampler().episode(i)) for i in range(30)]
    assert forwards == backwards[::-1] == fresh


def test_an_episode_does_not_depend_on_global_random_state() -> None:
    np.random.seed(1)
    one = as_lists(make_sampler().episode(3))
    np.random.seed(2)
    state = np.random.get_state()[1].tolist()
    assert as_lists(make_sampler().episode(3)) == one
    assert np.random.get_state()[1].tolist() == state


def test_a_pickled_sampler_gives_the_same_episodes() -> None:
    sampler = make_sampler()
    copy = pickle.loads(pickle.dumps(sampler))
    assert [as_lists(copy.episode(i)) for i in range(10)] == [as_lists(sampler.episode(i)) for i in range(10)]
    assert copy.digest(10) == sampler.digest(10)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_episodes_do_not_depend_on_string_hashes(tmp_path: Path, hash_seed: str) -> None:
    sampler = make_sampler()
    (tmp_path / "index.pickle").write_bytes(pickle.dumps(sampler.index))
    program = (
        "import json, pathlib, pickle, sys\n"
        "from episodes.sampler import EpisodeSampler\n"
        "index = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "sampler = EpisodeSampler(index, 5, 2, 3, 6)\n"
        "specs = [sampler.episode(i) for i in (7, 3, 0)]\n"
        "parts = [[s.class_ids, s.support, s.query, s.query_labels] for s in specs]\n"
        "lists = [[s.index, *(a.tolist() for a in p)] for s, p in zip(specs, parts)]\n"
        "print(json.dumps([lists, sampler.digest(20)]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "index.pickle")],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(result.stdout) == [[as_lists(sampler.episode(i)) for i in (7, 3, 0)], sampler.digest(20)]


def test_episodes_and_digests_equal_earlier_releases() -> None:
    """Written out, since a change of how episodes are drawn makes all earlier results incomparable."""
    sampler = make_sampler(way=3, shot=2, queries=1)
    assert as_lists(sampler.episode(7)) == [7, [0, 4, 9], [[10, 6], [56, 53], [109, 108]], [8, 115, 54], [0, 2, 1]]
    assert sampler.digest(20) == "c1e9c6c2b34bf3eb8aac41a1527bdd06ecd89150ca84723ba2f3729b5cf9b161"
    assert int(generator(6, "test", 7, 1).integers(2**62)) == 1720757452521340295  # from which a clip is drawn


def test_episodes_differ_between_seeds_splits_and_numbers() -> None:
    numbers = [as_lists(make_sampler().episode(i))[1:] for i in range(50)]
    seeds = [as_lists(make_sampler(seed=seed).episode(0))[1:] for seed in range(50, 100)]
    splits = [as_lists(make_sampler(split=split).episode(0))[1:] for split in ("train", "val")]
    everything = [json.dumps(spec) for spec in numbers + seeds + splits]
    assert len(set(everything)) == len(everything)


def test_generators_of_an_episode_and_its_clips_differ() -> None:
    draws = {int(generator(6, "train", *numbers).integers(2**62)) for numbers in [(4,), (4, 1), (4, 2), (5,), (5, 1)]}
    assert len(draws) == 5


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_any_valid_seed_works(seed: int) -> None:
    assert make_sampler(seed=seed).episode(10**9).index == 10**9


# --- contents of an episode -------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_episode_is_well_formed(data: st.DataObject) -> None:
    way, shot, queries = (data.draw(st.integers(1, most)) for most in (6, 5, 5))
    least = shot + queries
    sizes = data.draw(st.lists(st.integers(least, least + 4), min_size=way, max_size=way + 4))
    index = make_index(sizes)
    i = data.draw(st.integers(0, 10**6))
    spec = EpisodeSampler(index, way, shot, queries, data.draw(st.integers(0, 2**32 - 1))).episode(i)

    assert spec.index == i
    assert spec.class_ids.shape == (way,)
    assert spec.support.shape == (way, shot)
    assert spec.query.shape == spec.query_labels.shape == (way * queries,)
    assert all(part.dtype == np.int64 for part in (spec.class_ids, spec.support, spec.query, spec.query_labels))
    # Different classes; every video once, so support and query share none.
    assert len(set(spec.class_ids.tolist())) == way
    assert len({*spec.support.ravel().tolist(), *spec.query.tolist()}) == way * (shot + queries)
    # The support of row n is of class n, and a query's label is the position of its class.
    assert (index.class_of_video[spec.support] == spec.class_ids[:, None]).all()
    assert (index.class_of_video[spec.query] == spec.class_ids[spec.query_labels]).all()
    assert np.bincount(spec.query_labels, minlength=way).tolist() == [queries] * way


# --- fairness ---------------------------------------------------------------------------------------------


def test_every_class_and_every_video_of_a_class_is_equally_likely() -> None:
    index = make_index((8, 12, 9, 10, 30, 8, 11, 10))
    sampler = EpisodeSampler(index, 3, 2, 1, 0)
    classes, supports, queries = np.zeros(8), np.zeros(len(index)), np.zeros(len(index))
    for i in range(4000):
        spec = sampler.episode(i)
        classes[spec.class_ids] += 1
        supports[spec.support.ravel()] += 1
        queries[spec.query] += 1
    assert abs(chi_square(classes, 4000, 3 / 8)) < 4
    for class_id, videos in enumerate(index.videos_of_class):
        draws = int(classes[class_id])
        assert abs(chi_square(supports[videos], draws, 2 / len(videos))) < 4
        assert abs(chi_square(queries[videos], draws, 1 / len(videos))) < 4


def test_every_class_has_every_position_equally_often() -> None:
    first = np.zeros(10)
    for i in range(2000):
        first[make_sampler().episode(i).class_ids[0]] += 1
    assert abs(chi_square(first, 2000, 1 / 10)) < 4


@pytest.mark.parametrize("queries", [1, 3])
def test_query_order_does_not_depend_on_classes(queries: int) -> None:
    sampler = make_sampler(queries=queries)
    labels = np.stack([sampler.episode(i).query_labels for i in range(2000)])  # [episodes, Q]
    for label in range(5):
        at_position = (labels == label).sum(axis=0)
        assert abs(chi_square(at_position, 2000, 1 / 5)) < 4
    # Nor does the previous query: it has the same class as often as expected by chance.
    same = (labels[:, 1:] == labels[:, :-1]).mean()
    assert same == pytest.approx((queries - 1) / (5 * queries - 1), abs=0.02)


# --- impossible episodes ----------------------------------------------------------------------------------


def test_a_class_with_too_few_videos_is_refused_with_counts() -> None:
    with pytest.raises(UserError) as caught:
        EpisodeSampler(make_index((12, 3, 12, 4, 12)), 5, 2, 3, 6)
    problems = str(caught.value).split("\n")
    assert len(problems) == 2
    assert "test class 'class_1' has 3 videos" in problems[0]
    assert "2 shots and 3 queries per class needs 5" in problems[0]
    assert "test class 'class_3' has 4 videos" in problems[1]


def test_many_classes_with_too_few_videos_are_counted() -> None:
    with pytest.raises(UserError) as caught:
        EpisodeSampler(make_index((3,) * 7), 5, 2, 3, 6)
    problems = str(caught.value).split("\n")
    assert len(problems) == 3
    assert "5 more of the 7 test classes" in problems[2]


def test_too_few_classes_and_videos_are_refused_together() -> None:
    with pytest.raises(UserError) as caught:
        EpisodeSampler(make_index((12, 2, 12, 12)), 5, 1, 2, 6)
    problems = str(caught.value).split("\n")
    assert "test of tiny has 4 classes, a 5-way episode needs 5" in problems[0]
    assert "class 'class_1' has 2 videos" in problems[1]


def test_classes_with_just_enough_videos_are_used() -> None:
    spec = EpisodeSampler(make_index((5,) * 5), 5, 2, 3, 6).episode(0)
    assert sorted([*spec.support.ravel().tolist(), *spec.query.tolist()]) == list(range(25))


# --- the digest -------------------------------------------------------------------------------------------


def test_equal_episodes_have_equal_digests() -> None:
    assert make_sampler().digest(20) == make_sampler().digest(20)
    # The location and layout of the videos do not matter.
    elsewhere = replace(make_index(), root=Path("frames"), video_paths=make_index().video_names)
    assert EpisodeSampler(elsewhere, 5, 2, 3, 6).digest(20) == make_sampler().digest(20)


def test_the_digest_changes_with_the_episodes() -> None:
    samplers = [
        make_sampler(),
        make_sampler(seed=7),
        make_sampler(way=4),
        make_sampler(shot=3, queries=2),
        make_sampler(queries=2),
        make_sampler(split="val"),
        EpisodeSampler(make_index((13, *(12,) * 9)), 5, 2, 3, 6),
    ]
    digests = [*(sampler.digest(20) for sampler in samplers), make_sampler().digest(19), make_sampler().digest(21)]
    assert len(set(digests)) == len(digests)


def test_the_digest_changes_with_video_names_and_prompts() -> None:
    index = make_index()
    renamed = replace(index, video_names=tuple(f"{name}_2" for name in index.video_names))
    reworded = replace(index, classes=tuple(replace(entry, prompt="another") for entry in index.classes))
    digests = {EpisodeSampler(one, 5, 2, 3, 6).digest(20) for one in (index, renamed, reworded)}
    assert len(digests) == 3


def test_the_digest_distinguishes_shots_from_queries() -> None:
    # One class of three videos: for any division, the episode contains the same three videos.
    digests = [{EpisodeSampler(make_index((3,)), 1, k, 3 - k, seed).digest(1) for seed in range(20)} for k in (1, 2)]
    assert digests[0].isdisjoint(digests[1])
