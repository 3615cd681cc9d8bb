"""Evaluation from features that are computed once, against encoding and scoring every episode again.

    python benchmarks/evaluation.py

Both sides run in this process, on the same synthetic videos (noise, made in memory), weights and episodes. The literal
side (benchmarks/literal_evaluation.py) encodes all videos of every episode and scores one episode at a time; ours is
`run.evaluation`. Times of a whole test run are extrapolated: the literal side's from --literal-episodes, ours from
--measure-videos videos and --score-episodes episodes. All times are seconds of processor time on one thread, which
other programs hardly change; scoring is repeated --repeats times in turn, and the shortest time counts.
The command fails unless scores and answers agree in the episodes that both sides score.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks import literal_evaluation as literal
from benchmarks.machine import machine
from episodes.dataset import ClipOptions, ClipReader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from episodes.splits import ClassEntry, SplitIndex
from models.base import FewShotModel, ProtocolName
from run.command import run_command
from run.encoder import Encoder
from run.evaluation import precompute_queries, precompute_supports, score_episodes
from run.features import FeatureBank, encode_videos

CPU = torch.device("cpu")
CLASSES = 10  # as in HMDB51's test split
ROWS: tuple[tuple[str, ProtocolName], ...] = (
    ("clipspm", "transductive"),
    ("clipspm", "inductive"),
    ("clipfsar", "inductive"),
    ("otam", "inductive"),
)
MAX_DIFFERENCE = 1e-4  # tolerance of a score, relative to the largest score


@dataclass(frozen=True)
class Row:
    """Scoring of one method: seconds per episode on both sides, ours without the preparation.

    preparation: seconds for all supports. operations: number in our matrix products per episode.
    """

    method: str
    protocol: ProtocolName
    literal: float
    ours: float
    preparation: float
    operations: float
    difference: float


def build(method: str, options: argparse.Namespace) -> FewShotModel:
    """Returns the method with random weights, in evaluation mode."""
    torch.manual_seed(0)
    weights = {"NAME": method, "BACKBONE": options.backbone, "CLIP_WEIGHTS": "random"}
    return models.build(models.options_of(method)(**weights), options.image_size).eval()


def synthetic_index(videos: int, classes_of_split: int = CLASSES) -> SplitIndex:
    """Returns a split of `videos` videos, evenly distributed over the classes; the videos do not exist on disk."""
    class_of_video = np.arange(videos) * classes_of_split // videos
    names = tuple(f"class_{number}/{video}" for video, number in enumerate(class_of_video.tolist()))
    classes = tuple(ClassEntry(f"class_{number}", f"action number {number}", 0) for number in range(classes_of_split))
    return SplitIndex("synthetic", "test", Path("nowhere"), classes, names, names, class_of_video, False)


def synthetic_frames(path: Path, frames: int, size: int) -> np.ndarray:
    """Returns the frames of a synthetic video, noise that depends on its number: uint8 [T, size, size, 3]."""
    return np.random.default_rng(int(path.name)).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def shortest_time(repeats: int, *sides: Callable[[], object]) -> list[float]:
    """Returns the shortest processor time of each side in seconds; the sides take turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, seconds in zip(sides, times, strict=True):
            start = time.process_time()
            side()
            seconds.append(time.process_time() - start)
    return [min(seconds) for seconds in times]


def difference_of(actual: Tensor, expected: Tensor, what: str) -> float:
    """Returns the largest difference relative to the largest score.

    Raises:
        RuntimeError: the difference is too large, or the answers differ.
    """
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    if difference > MAX_DIFFERENCE or not torch.equal(actual.argmax(-1), expected.argmax(-1)):
        raise RuntimeError(f"{what}: the two sides do not agree (largest relative difference {difference:.1e})")
    return difference


class Literal:
    """The literal side of one method and protocol."""

    def __init__(self, model: FewShotModel, class_text: Tensor, method: str, protocol: ProtocolName) -> None:
        scores = literal.METHODS[method]
        # A method whose queries do not see each other scores them together under both protocols, as our side does.
        is_alone = protocol == "inductive" and model.transductive
        self.scores = literal.each_query_alone(scores) if is_alone else scores
        self.model, self.class_text = model, class_text

    @torch.no_grad()
    def score(self, spec: EpisodeSpec, features: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Computes the scores of an episode, [Q, N]; `features` returns those of videos, [V] -> [V, T, D]."""
        labels = torch.arange(len(spec.class_ids)).repeat_interleave(spec.support.shape[1])
        text = self.class_text[torch.from_numpy(spec.class_ids)]
        return self.scores(self.model, features(spec.support.ravel()), labels, features(spec.query), text)


# --- encoding ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """Seconds of the literal side per episode and of our side per video, and the difference of the scores."""

    literal_episode: float
    our_video: float
    literal_measured: int
    ours_measured: int
    difference: float


def measure_encoding(sampler: EpisodeSampler, options: argparse.Namespace) -> Encoding:
    """Encodes a few episodes literally, and their videos and some further ones once each."""
    method, protocol = ROWS[0]
    model, index = build(method, options), sampler.index
    class_text = model.class_text(index.prompts)
    encoder = Encoder(model, CPU, normalise_pixels=True, amp=False)
    specs = [sampler.episode(i) for i in range(options.literal_episodes)]
    used = {int(video) for spec in specs for video in [*spec.support.ravel(), *spec.query]}
    others = (video for video in range(len(index)) if video not in used)
    sample = [*used, *others][: max(len(used), options.measure_videos)]

    def clips(videos: Sequence[int]) -> Tensor:
        frames = [synthetic_frames(index.path(int(v)), options.frames, options.image_size) for v in videos]
        return torch.from_numpy(np.stack(frames)).movedim(-1, 2)

    literal_features: list[list[Tensor]] = []  # for each episode its supports, then its queries
    banks: list[FeatureBank] = []

    @torch.no_grad()
    def literally() -> None:
        literal_features[:] = [[encoder(clips(v)) for v in (spec.support.ravel(), spec.query)] for spec in specs]

    def ours() -> None:
        clip_options = ClipOptions(options.frames, "linspace", options.image_size, options.image_size, flip=False)
        banks[:] = [encode_videos(encoder, index, sample, ClipReader(clip_options, workers=0))]

    seconds = shortest_time(1, literally, ours)
    bank, side = banks[0], Literal(model, class_text, method, protocol)
    parts = (iter(features) for features in literal_features)
    expected = torch.stack(
        [side.score(spec, lambda _, part=part: next(part)) for spec, part in zip(specs, parts, strict=True)]
    )
    supports = precompute_supports(model, bank, index, sample, class_text)
    queries = precompute_queries(model, bank, sample, class_text.device)
    scores = score_episodes(model, specs, supports, queries, class_text, [protocol], options.batch_episodes)[protocol]
    return Encoding(
        literal_episode=seconds[0] / len(specs),
        our_video=seconds[1] / len(sample),
        literal_measured=len(specs),
        ours_measured=len(sample),
        difference=difference_of(torch.cat(scores), expected, "encoding"),
    )


# --- scoring ----------------------------------------------------------------------------------------------


def measure_scoring(method: str, protocol: ProtocolName, sampler: EpisodeSampler, options: argparse.Namespace) -> Row:
    """Scores the same features (noise in the shape of the method's features) on both sides."""
    model, index = build(method, options), sampler.index
    class_text = model.class_text(index.prompts)
    with torch.no_grad():
        shape = model.encode(torch.zeros(1, options.frames, 3, options.image_size, options.image_size)).shape[1:]
    videos = range(len(index))
    features = torch.randn(len(index), *shape, generator=torch.Generator().manual_seed(1))
    bank = FeatureBank(features, np.arange(len(index)))
    side = Literal(model, class_text, method, protocol)
    prepared: list[FeatureBank] = []
    scores: dict[str, Tensor] = {}

    both = min(options.literal_episodes, options.score_episodes)
    specs = [sampler.episode(i) for i in range(max(options.literal_episodes, options.score_episodes))]

    def literally() -> None:
        few = specs[: options.literal_episodes]
        scores["literal"] = torch.stack([side.score(spec, lambda v: features[torch.from_numpy(v)]) for spec in few])

    def ours() -> None:
        many = specs[: options.score_episodes]
        batches = score_episodes(model, many, *prepared, class_text, [protocol], options.batch_episodes)
        scores["ours"] = torch.cat(batches[protocol])

    def prepare() -> None:
        prepared[:] = [
            precompute_supports(model, bank, index, videos, class_text),
            precompute_queries(model, bank, videos, class_text.device),
        ]

    (preparation,) = shortest_time(1, prepare)
    seconds = shortest_time(options.repeats, literally, ours)
    with FlopCounterMode(display=False) as counter:
        score_episodes(model, specs[:1], *prepared, class_text, [protocol], 1)
    return Row(
        method=method,
        protocol=protocol,
        literal=seconds[0] / options.literal_episodes,
        ours=seconds[1] / options.score_episodes,
        preparation=preparation,
        operations=counter.get_total_flops(),
        difference=difference_of(scores["ours"][:both], scores["literal"][:both], f"{method} {protocol}"),
    )


def matrix_rate() -> float:
    """Operations/s of a large matrix product on this thread, the best of many times."""
    size = 1024
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / shortest_time(20, lambda: left @ right)[0]


# --- report -----------------------------------------------------------------------------------------------


def report(encoding: Encoding, rows: Sequence[Row], used: int, rate: float, options: argparse.Namespace) -> str:
    """Returns the Markdown tables; rate: operations/s of a large matrix product."""
    episodes, frames = options.episodes, options.frames
    per_episode = options.way * (options.shot + 1) * frames
    literal_encoding, our_encoding = episodes * encoding.literal_episode, used * encoding.our_video
    lines = [
        f"{episodes:,} episodes, {options.way}-way {options.shot}-shot with one query per class, over "
        f"{options.videos:,} videos of {frames} frames of {options.image_size} pixels; {options.backbone}, random "
        f"weights, float32, TEST.BATCH_EPISODES={options.batch_episodes}. Machine: {options.machine}.",
        "",
        "| encoding | literal | ours | ratio |",
        "|---|---|---|---|",
        f"| frames encoded | {episodes * per_episode:,} | {used * frames:,} | "
        f"{episodes * per_episode / (used * frames):.0f} |",
        f"| seconds (extrapolated) | {literal_encoding:,.0f} | {our_encoding:,.0f} | "
        f"{literal_encoding / our_encoding:.0f} |",
        "",
        f"Extrapolated in proportion, the literal side from {encoding.literal_measured} episodes "
        f"({encoding.literal_measured * per_episode:,} frames), ours from {encoding.ours_measured} videos "
        f"({encoding.ours_measured * frames:,} frames). Scores after either encoding differ by at most "
        f"{encoding.difference:.1e} of the largest score; all answers are the same.",
        "",
        "| scoring alone | protocol | literal, episodes/s | ours, episodes/s | ratio | highest ratio | "
        "preparing all supports, s | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row.ours + row.preparation / episodes
        lines.append(
            f"| {row.method} | {row.protocol} | {1 / row.literal:.2f} | {1 / ours:.2f} | {row.literal / ours:.1f} | "
            f"{row.literal * rate / row.operations:.0f} | {row.preparation:.2f} | {row.difference:.1e} |"
        )
    lines += [
        "",
        f"Measured on {options.literal_episodes} and {options.score_episodes} episodes from the same features, the "
        f"best of {options.repeats} times; ours with its share of the preparation. All answers are the same. Highest "
        f"ratio: if scoring were only the matrix products that are left after the preparation, at the {rate / 1e9:.0f} "
        "GFLOP/s of a large product.",
        "",
        "| whole test (extrapolated) | protocol | literal, hours | ours, hours | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        literal_total = literal_encoding + episodes * row.literal
        our_total = our_encoding + row.preparation + episodes * row.ours
        lines.append(
            f"| {row.method} | {row.protocol} | {literal_total / 3600:.1f} | {our_total / 3600:.2f} | "
            f"{literal_total / our_total:.0f} |"
        )
    together, alone = rows[:2]
    literal_total = literal_encoding + episodes * together.literal
    our_total = our_encoding + together.preparation + episodes * (together.ours + alone.ours)
    lines.append(
        f"| {together.method} | both; literal only transductive | {literal_total / 3600:.1f} | "
        f"{our_total / 3600:.2f} | {literal_total / our_total:.0f} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B/16")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--videos", type=int, default=1292, help="of the split")
    parser.add_argument("--episodes", type=int, default=10000, help="of the whole test")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=5)
    parser.add_argument("--batch-episodes", type=int, default=0, help="TEST.BATCH_EPISODES; 0: chosen")
    parser.add_argument("--literal-episodes", type=int, default=2, help="measured on the literal side")
    parser.add_argument("--measure-videos", type=int, default=64, help="encoded on our side")
    parser.add_argument("--score-episodes", type=int, default=50, help="scored on our side")
    parser.add_argument("--repeats", type=int, default=3, help="of the scoring")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.machine = machine()

    sampler = EpisodeSampler(synthetic_index(options.videos), options.way, options.shot, 1, seed=1)
    specs = (sampler.episode(i) for i in range(options.episodes))
    used = len(set().union(*({*spec.support.ravel(), *spec.query} for spec in specs)))
    with mock.patch(
        "episodes.dataset.read_frames",
        lambda path, choose: (synthetic_frames(path, options.frames, options.image_size), choose),
    ):
        encoding = measure_encoding(sampler, options)
    rows = [measure_scoring(method, protocol, sampler, options) for method, protocol in ROWS]
    print(report(encoding, rows, used, matrix_rate(), options), end="")


if __name__ == "__main__":
    run_command(main)
