"""Builds the sections that show videos and what the tested model computes for them.

Shapes: V videos, T and S frames, N ways, K shots, C classes, D features.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.explanation import Explanation, Measure
from run.answers import Answers
from run.reporting import figures, numbers
from run.reporting.page import Drawing, Section, Table
from run.reporting.replayed import ExplainedQuery, ExplainedVideos, TestedModel, TestVideos, clips_of_query
from utils.errors import UserError

THUMBNAIL = 80  # pixels
MAX_SHOTS = 3
MIN_SPREAD = 1e-6  # of features of length 1
PERPLEXITY = 30
Result = TypeVar("Result")


class Notes(list[str]):
    """Sentences about the parts that are missing from a report."""

    def attempt(self, effect: str, make: Callable[[], Result]) -> Result | None:
        """Returns the result of `make`; if it raises a UserError, adds a note and returns None."""
        try:
            return make()
        except UserError as error:
            note = f"{effect}: {error}"
            if note not in self:
                self.append(note)
            return None


# --- wrong answers ----------------------------------------------------------------------------------------


def mistakes_section(
    answers: Answers,
    protocol: str,
    pairs: Sequence[numbers.ConfusedPair],
    videos: TestVideos | None,
    model: TestedModel | None,
    notes: Notes,
) -> Section:
    """Returns the most confused pairs of classes, each with a wrong answer, its frames, scores and alignment."""
    if not pairs:
        return Section("Most confused classes", ["All answers are correct."])
    name = answers.classes
    header = ("true class", "answer", "percent", "wrong answers", "queries with this choice")
    rows = [(name[p.true], name[p.chosen], f"{p.rate:.1f}", p.wrong, p.choices) for p in pairs]
    order = "Ordered by the lower end of the 95 % interval of the percentage, so pairs with few queries come later."
    section = Section("Most confused classes", [order, Table(header, rows)])
    places = numbers.clearest_mistakes(answers, protocol, list(pairs))
    for number, (pair, (episode, query)) in enumerate(zip(pairs, places, strict=True), start=1):
        section.parts += [
            f"{number}. {name[pair.true]} answered as {name[pair.chosen]}: the query "
            f"{answers.videos[answers.query[episode, query]]} of episode {episode}, the wrong answer with the largest "
            "lead.",
            _score_table(answers, protocol, episode, query),
        ]
        show = partial(_replayed, answers, protocol, videos, model, episode, query)
        if explained := notes.attempt("no frames of a wrong answer", show):
            section.parts += mistake_drawings(answers, protocol, explained, number, episode, query)
            if not explained.reproduces_scores:
                notes.append(f"episode {episode}: the scores differ from those of the test run; did videos change?")
    return section


def _replayed(
    answers: Answers,
    protocol: str,
    videos: TestVideos | None,
    model: TestedModel | None,
    episode: int,
    query: int,
) -> ExplainedQuery | None:
    """Returns a query with its explanation; without a model only its clips, without videos None."""
    if videos is None:
        return None
    if model is None:
        return clips_of_query(videos, answers, episode, query)
    return model.query(videos, answers, protocol, episode, query)


def _score_table(answers: Answers, protocol: str, episode: int, query: int) -> Table:
    """Returns a table of the scores of one query, the highest first."""
    scores, right = answers.scores[protocol][episode, query], answers.labels[episode, query]
    order = np.argsort(-scores, kind="stable")
    roles = {int(order[0]): "answer", int(right): "true class"}
    rows = [(answers.classes[answers.class_ids[episode, n]], f"{scores[n]:#.4g}", roles.get(int(n), "")) for n in order]
    return Table(("class", "score", ""), rows, strong=[i for i, n in enumerate(order) if int(n) in roles])


def mistake_drawings(
    answers: Answers, protocol: str, explained: ExplainedQuery, number: int, episode: int, query: int
) -> list[str | Table | Drawing]:
    """Draws the frames of a query and of its right and chosen class, the alignments and the measures."""
    right = int(answers.labels[episode, query])
    chosen = int(answers.scores[protocol][episode, query].argmax())
    ways = [(right, figures.GREEN, "right"), (chosen, figures.RED, "chosen")]
    names = [str(answers.classes[c]) for c in answers.class_ids[episode]]
    rows = [("query", _thumbnails(explained.query), figures.BLUE)]
    listed = [("query", names[right], answers.videos[answers.query[episode, query]])]
    for way, colour, role in ways:
        for shot in range(min(MAX_SHOTS, explained.support.shape[1])):
            rows.append((figures.short(names[way]), _thumbnails(explained.support[way, shot]), colour))
            listed.append((role, names[way], answers.videos[answers.support[episode, way, shot]]))
    caption = "The query, then support videos of the right class and of the chosen one, as the model sees them."
    data = Table(("role", "class", "video"), listed)
    drawings: list[str | Table | Drawing] = [Drawing(f"mistake_{number}_frames", figures.strips(rows), caption, data)]
    if explained.explanation is None:
        return drawings
    first_shots = [(names[way], _thumbnails(explained.support[way, 0])) for way, _, _ in ways]
    drawings += _alignment(explained.explanation, _thumbnails(explained.query), first_shots, (right, chosen), number)
    if explained.explanation.measures:
        drawings.append(_query_measures(explained.explanation.measures, names, (right, chosen), number))
    return drawings


def _alignment(
    explanation: Explanation,
    query: np.ndarray,
    classes: Sequence[tuple[str, np.ndarray]],
    ways: tuple[int, int],
    number: int,
) -> list[str | Drawing]:
    """Draws the pairing of the query's frames with those of the right and the chosen class."""
    sentences: list[str | Drawing] = [
        f"{name}: compares averages over time, so it pairs no frames."
        for name, pairing in explanation.pairings.items()
        if pairing is None
    ]
    pairings = {
        name: tuple(pairing[0, 0, way].float().numpy() for way in ways)
        for name, pairing in explanation.pairings.items()
        if pairing is not None
    }
    if not pairings:
        return sentences or ["This method pairs no frames."]
    rows = [
        (name, role, label, t + 1, s + 1, f"{weight:.6g}")
        for name, matrices in pairings.items()
        for matrix, role, (label, _) in zip(matrices, ("right", "chosen"), classes, strict=True)
        for (t, s), weight in np.ndenumerate(matrix)
    ]
    caption = (
        "How much each pair of frames counts in the distance of the query to the class: the gradient of the distance "
        "with respect to the pair, which for OTAM is the soft alignment path. With several shots, the frames are those "
        "of the first shot, and the weights are those of all."
    )
    drawn = figures.alignment(pairings, query, classes[0], classes[1])  # type: ignore[arg-type]
    data = Table(("pairing", "role", "class", "query frame", "class frame", "weight"), rows)
    return [*sentences, Drawing(f"mistake_{number}_alignment", drawn, caption, data)]


def _query_measures(measures: dict[str, Measure], names: Sequence[str], ways: tuple[int, int], number: int) -> Drawing:
    """Draws the measures of one query; measures that depend on the class are drawn for the right and the chosen one."""
    lines = {}
    for name, measure in measures.items():
        values = measure.values[0, 0].float().numpy()
        series = {"query": values[0]} if len(values) == 1 else {names[way]: values[way] for way in ways}
        lines[name] = measure, series
    rows = [
        (name, label, _column_names(measure, names, len(values))[i], f"{value:.6g}")
        for name, (measure, series) in lines.items()
        for label, values in series.items()
        for i, value in enumerate(values)
    ]
    caption = " ".join(f"{name.capitalize()}: {measure.meaning}" for name, measure in measures.items())
    data = Table(("measure", "of", "at", "value"), rows)
    return Drawing(f"mistake_{number}_measures", figures.query_measures(lines, names), caption, data)


def _column_names(measure: Measure, classes: Sequence[str], length: int) -> list[str]:
    """Returns the names of the X numbers of a measure."""
    if measure.axis == "class":
        return list(classes)
    return list(measure.parts) if measure.axis == "part" else [str(i + 1) for i in range(length)]


def _thumbnails(clip: Tensor) -> np.ndarray:
    """Returns small frames of a clip: uint8 [T, 3, H, W] -> uint8 [T, h, w, 3]."""
    if max(clip.shape[-2:]) > THUMBNAIL:
        small = torch.nn.functional.interpolate(clip.float(), size=THUMBNAIL, mode="bilinear", antialias=True)
        clip = small.round().clamp(0, 255).to(torch.uint8)
    return clip.movedim(1, -1).numpy()


# --- the whole split --------------------------------------------------------------------------------------


def chosen_videos(answers: Answers, limit: int) -> list[int]:
    """Returns at most `limit` query videos of the test run, spread evenly over the classes."""
    videos = np.unique(answers.query)
    classes = class_of_videos(answers, videos)
    rank = np.zeros(len(videos), dtype=int)
    for class_id in np.unique(classes):
        rank[classes == class_id] = np.arange((classes == class_id).sum())
    return sorted(videos[np.argsort(rank, kind="stable")[:limit]].tolist())


def class_of_videos(answers: Answers, videos: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the class of each query video, as a position in `Answers.classes`: int64 [V]."""
    classes = np.full(len(answers.videos), -1)
    classes[answers.query] = answers.true_classes()
    return classes[np.asarray(videos)]


def features_section(explained: ExplainedVideos, classes: np.ndarray, names: Sequence[str]) -> Section:
    """Returns a section with the t-SNE of the videos' features before and after the modules of the method."""
    spaces = {"backbone": explained.encoded, **explained.behind}
    points = {name: _tsne(features) for name, features in spaces.items()}
    near = {name: numbers.same_class_neighbours(features, classes) for name, features in spaces.items()}
    titles = {f"{name}: {near[name]:.0f} % same-class neighbours": points[name] for name in spaces}
    caption = (
        f"t-SNE of {len(classes)} query videos, by the cosine of all frames in order. The percentage of videos whose "
        "nearest neighbour has the same class is computed before t-SNE. Distances between clusters mean nothing."
    )
    if not explained.behind:
        caption += " The method has no modules after the backbone."
    rows = [
        (space, number, names[classes[number]], f"{x:.4f}", f"{y:.4f}")
        for space, coordinates in points.items()
        for number, (x, y) in enumerate(coordinates)
    ]
    data = Table(("features", "video", "class", "x", "y"), rows)
    drawing = Drawing("features", figures.scatter(titles, classes, names), caption, data)
    return Section("Features of videos", [drawing])


def _tsne(features: np.ndarray) -> np.ndarray:
    """Computes t-SNE with a fixed seed: float [V, D] -> float [V, 2]."""
    from sklearn.manifold import TSNE

    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = max(1.0, min(PERPLEXITY, (len(features) - 1) / 3))
    has_spread = bool(np.ptp(units, axis=0).max() > MIN_SPREAD)  # PCA of equal features gives NaN, which crashes Python
    start = "pca" if min(features.shape) > 1 and has_spread else "random"
    return TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(units)


def measures_section(
    explained: ExplainedVideos, classes: np.ndarray, names: Sequence[str], order: np.ndarray
) -> Section:
    """Returns a section with the mean of each measure for each class, in the order of the confusion matrix."""
    rows = [class_id for class_id in order if (classes == class_id).any()]
    section = Section("Inside the method", [f"Means over {len(classes)} query videos, each among all classes."])
    present = np.unique(order)
    for name, measure in explained.measures.items():
        values = measure.values.float().numpy()
        per_video = values[:, 0]
        if values.shape[1] > 1:  # with the true class
            per_video = values[np.arange(len(values)), np.searchsorted(present, classes)]
        means = np.stack([per_video[classes == class_id].mean(axis=0) for class_id in rows])
        columns = _column_names(measure, [names[class_id] for class_id in order], means.shape[1])
        if measure.axis == "class":
            means = means[:, np.searchsorted(present, order)]
        cells = [(names[rows[row]], columns[column], f"{value:.6g}") for (row, column), value in np.ndenumerate(means)]
        drawn = figures.class_measures(measure, means, [names[class_id] for class_id in rows], columns)
        caption = f"{name.capitalize()}. {measure.meaning}"
        file = "measure_" + "_".join(re.findall(r"\w+", name))  # a name may contain a slash or brackets
        section.parts.append(Drawing(file, drawn, caption, Table(("true class", "at", "mean"), cells)))
    return section


def split_sections(
    model: TestedModel, videos: TestVideos, answers: Answers, order: np.ndarray, limit: int
) -> list[Section]:
    """Returns the sections on many query videos.

    Raises:
        UserError: a video is missing or unreadable.
    """
    chosen = chosen_videos(answers, limit)
    classes, names = class_of_videos(answers, chosen), [str(name) for name in answers.classes]
    explained = model.split(videos, answers, [str(answers.videos[video]) for video in chosen])
    sections = [features_section(explained, classes, names)] if len(chosen) > 2 else []
    return sections + ([measures_section(explained, classes, names, order)] if explained.measures else [])


def videos_and_model(
    config: Any, results: dict[str, Any], answers: Answers, directory: Any, notes: Notes
) -> tuple[TestVideos | None, TestedModel | None]:
    """Returns the test videos and the tested model; each is None, with a note, if it is missing."""
    videos = notes.attempt("no frames, alignments or features", lambda: TestVideos(config))
    if videos is None:
        return None, None
    model = notes.attempt("no alignments or features", lambda: TestedModel(config, results, answers, directory))
    return videos, model
