"""How cost grows with shots, ways, frames, episodes per call, videos and threads; about five minutes on two cores.

    pip install -r requirements-report.txt
    python benchmarks/growth.py

Small models (the tiny backbone on 64 pixels, the layer sizes of the demo) on random inputs: costs grow like those
of large models, but the numbers differ. One parameter at a time is varied around a default (5-way 1-shot, one
query per class, 8 frames, 20 episodes scored in a call, 1,292 videos):

    encoding   one video, backbone and all, uint8 pixels to features
    scoring    one test episode from features, with precomputed support videos, inductive protocol
    test       10,000 episodes: encoding and precomputing all videos once, scoring every episode (extrapolated)
    training   one episode forward and backward, backbone and all

Times are processor times of one thread, the shortest of --repeats. Times over threads are wall times, so other programs
on the machine affect them.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import models
from benchmarks.evaluation import synthetic_index
from benchmarks.machine import machine
from episodes.sampler import EpisodeSampler
from models.base import Episode, EpisodeLabels, FewShotModel
from run.command import run_command
from run.encoder import Encoder
from run.evaluation import precompute_queries, precompute_supports, score_episodes
from run.features import FeatureBank
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
IMAGE_SIZE = 64
CLASSES = 24  # classes of the synthetic split, so that 20 ways are possible
TEST_EPISODES = 10_000
FRAMES_PER_BATCH = 256  # frames encoded at once, for any clip length
SMALL = {"HEADS": 4, "HEAD_DIM": 32, "HIDDEN": 256, "DROPOUT": 0.0, "HIDDEN_DROPOUT": 0.0}
METHODS: dict[str, dict[str, Any]] = {"clipspm": {"TRANSFORMER": SMALL, "SPM": {"GENERATOR_HIDDEN": 256}}, "otam": {}}


@dataclass(frozen=True)
class Setting:
    """The sizes of an episode and a test run."""

    way: int = 5
    shot: int = 1
    frames: int = 8
    batch_episodes: int = 20
    videos: int = 1292


@dataclass(frozen=True)
class Cost:
    """Seconds."""

    encoding: float
    preparing: float
    scoring: float
    training: float
    videos: int

    @property
    def test(self) -> float:
        """The seconds of a whole test run, extrapolated."""
        return self.videos * (self.encoding + self.preparing) + TEST_EPISODES * self.scoring


@dataclass(frozen=True)
class Panel:
    """One plot: lines[name][i] is the value at positions[i]."""

    title: str
    unit: str
    positions: Sequence[float]
    lines: Mapping[str, Sequence[float]]


QUICK = Setting(way=2, frames=2, batch_episodes=2, videos=240)

# The varied setting -> its name in tables and plot, its values, and the values of a quick run.
AXES: dict[str, tuple[str, list[int], list[int]]] = {
    "shot": ("shots", [1, 2, 5, 10], [1, 2]),
    "way": ("ways", [2, 5, 10, 20], [2, 5]),
    "frames": ("frames in a clip", [4, 8, 16, 32], [2, 4]),
    "batch_episodes": ("episodes scored in a call", [1, 5, 20, 50], [1, 5]),
}
VIDEOS = ([120, 1292, 12_000, 77_500], [120, 240])


def build(method: str) -> FewShotModel:
    """Returns the method on the tiny backbone with random weights."""
    torch.manual_seed(0)
    options = models.options_of(method)(
        NAME=method, BACKBONE="tiny", CLIP_WEIGHTS="random", FREEZE_BN=False, **METHODS[method]
    )
    return models.build(options, IMAGE_SIZE)


def shortest_time(repeats: int, clock: Callable[[], float], action: Callable[[], object]) -> float:
    """Returns the shortest time of an action in seconds, after a first one that is not timed."""
    action()
    times = []
    for _ in range(repeats):
        start = clock()
        action()
        times.append(clock() - start)
    return min(times)


def noise(videos: int, frames: int) -> torch.Tensor:
    """Returns random videos: uint8 [V, T, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (videos, frames, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)


def measure(model: FewShotModel, setting: Setting, repeats: int, clock: Callable[[], float]) -> Cost:
    """Measures the costs of one method under one setting."""
    index = synthetic_index(setting.videos, CLASSES)
    sampler = EpisodeSampler(index, setting.way, setting.shot, 1, seed=1)
    class_text = torch.randn(CLASSES, model.class_text(["a"]).shape[-1], generator=torch.Generator().manual_seed(2))
    encoder = Encoder(model, CPU, normalise_pixels=True, amp=False)
    model.eval()
    clips = noise(FRAMES_PER_BATCH // setting.frames, setting.frames)
    with torch.no_grad():
        features = encoder(clips)
        encoding = shortest_time(repeats, clock, lambda: encoder(clips)) / len(clips)
    bank = FeatureBank(features[torch.arange(setting.videos) % len(clips)], np.arange(setting.videos))
    some = range(min(setting.videos, 256))

    def prepare() -> list[FeatureBank]:
        supports = precompute_supports(model, bank, index, some, class_text)
        return [supports, precompute_queries(model, bank, some, class_text.device)]

    preparing = shortest_time(repeats, clock, prepare) / len(some)
    # Repeated, since only the size matters here.
    supports, queries = (
        FeatureBank(few.features[torch.arange(setting.videos) % len(few.features)], bank.row_of_video)
        for few in prepare()
    )

    def score() -> None:
        specs = [sampler.episode(i) for i in range(setting.batch_episodes)]
        score_episodes(model, specs, supports, queries, class_text, ["inductive"], setting.batch_episodes)

    scoring = shortest_time(repeats, clock, score) / setting.batch_episodes
    model.train()
    clips = noise(setting.way * (setting.shot + 1), setting.frames)
    training = shortest_time(repeats, clock, lambda: train_one(encoder, clips, setting, class_text))
    return Cost(encoding, preparing, scoring, training, setting.videos)


def train_one(encoder: Encoder, clips: torch.Tensor, setting: Setting, class_text: torch.Tensor) -> None:
    """Runs one training episode forward and backward, without changing the parameters."""
    way, supports = setting.way, setting.way * setting.shot
    features = encoder(clips)
    support = features[:supports].unflatten(0, (way, setting.shot))
    episode = Episode(support[None], features[None, supports:], class_text[None, :way])
    labels = EpisodeLabels(torch.arange(way)[None], torch.arange(way)[None], class_text)
    encoder.model.training_losses(episode, labels, "inductive").total.backward()
    encoder.model.zero_grad()


# --- tables and plot --------------------------------------------------------------------------------------


def table(name: str, costs: dict[int, dict[str, Cost]]) -> list[str]:
    """Returns a Markdown table with a line for each value and method."""
    lines = [
        f"| {name} | method | encoding a video, ms | scoring an episode, ms | test, s | training an episode, ms |",
        "|---|---|---|---|---|---|",
    ]
    for value, by_method in costs.items():
        for method, cost in by_method.items():
            lines.append(
                f"| {value:,} | {method} | {1e3 * cost.encoding:.2f} | {1e3 * cost.scoring:.2f} | {cost.test:.0f} | "
                f"{1e3 * cost.training:.1f} |"
            )
    return [*lines, ""]


def panel(name: str, costs: dict[int, dict[str, Cost]]) -> Panel:
    """Returns the panel of scoring and training with both methods over one axis."""
    lines = {}
    for method in METHODS:
        lines[f"{method}, training"] = [1e3 * by_method[method].training for by_method in costs.values()]
        lines[f"{method}, scoring"] = [1e3 * by_method[method].scoring for by_method in costs.values()]
    return Panel(name, "ms per episode", list(costs), lines)


def test_panel(name: str, costs: dict[int, dict[str, Cost]]) -> Panel:
    """Returns the panel of a whole test run over the number of videos."""
    lines = {f"{method}, test": [by_method[method].test for by_method in costs.values()] for method in METHODS}
    return Panel(name, f"s per {TEST_EPISODES:,} episodes", list(costs), lines)


def over(axis: str, values: Sequence[int], base: Setting, repeats: int) -> dict[int, dict[str, Cost]]:
    """Returns value -> method -> cost."""
    return {
        value: {
            method: measure(build(method), dataclasses.replace(base, **{axis: value}), repeats, time.process_time)
            for method in METHODS
        }
        for value in values
    }


def over_threads(base: Setting, repeats: int) -> dict[int, dict[str, Cost]]:
    """Returns the wall times of five shots with one thread, and with as many as there are cores."""
    costs = {}
    setting = dataclasses.replace(base, shot=5)
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        costs[threads] = {method: measure(build(method), setting, repeats, time.perf_counter) for method in METHODS}
    torch.set_num_threads(1)
    return costs


def raise_if_no_matplotlib() -> None:
    """Raises UserError if the plot cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the plot needs matplotlib ({error}): pip install -r {ROOT / 'requirements-report.txt'}"
        ) from error


def draw(panels: Sequence[Panel], path: Path, columns: int = 3) -> None:
    """Writes the panels as one picture, both axes logarithmic, with one legend for all."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.4), layout="constrained")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    legend = {}
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        for name, values in panel.lines.items():
            (legend[name],) = axes.plot(panel.positions, values, "o-", color=f"C{names.index(name)}")
        axes.set(title=panel.title, ylabel=panel.unit, xscale="log", yscale="log")
        axes.set_xticks(panel.positions, [f"{position:,}" for position in panel.positions])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=len(legend))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):  # text as text, reproducible
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two values per parameter, as a quick check")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for growth.md and growth.svg")
    options = parser.parse_args(arguments)
    raise_if_no_matplotlib()  # before minutes of measuring
    torch.set_num_threads(1)
    base = QUICK if options.quick else Setting()
    lines, panels = [f"Machine: {machine()}.", ""], []
    for axis, (name, values, few) in AXES.items():
        costs = over(axis, few if options.quick else values, base, options.repeats)
        lines += table(name, costs)
        panels.append(panel(name, costs))
    costs = over("videos", VIDEOS[options.quick], base, options.repeats)
    lines += table("videos", costs)
    panels += [panel("videos", costs), test_panel("videos, whole test", costs)]
    load = os.getloadavg()[0]
    lines += [f"Wall times, five shots; load at the start {load:.1f}; not reliable above the number of cores:", ""]
    lines += table("threads", over_threads(base, options.repeats))
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    (options.out / "growth.md").write_text(text, encoding="utf-8")
    draw(panels, options.out / "growth.svg")


if __name__ == "__main__":
    run_command(main)
