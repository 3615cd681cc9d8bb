"""Answers to a user's clips as text, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fsar import Prediction
from run.timeline import Segment, Timeline

MAX_SHOWN = 5  # classes per query in the text; CSV and JSON contain all
NONE = "none of these"


@dataclass(frozen=True)
class Answer:
    """The answer to one clip or to one of its windows.

    query: path of the clip.
    answer: the best class, or NONE if it is rejected.
    probability, score: those of the best class.
    margin: its probability minus that of the second class.
    scores, probabilities: class -> number.
    start, stop: limits of the window, in `unit` ("s", or "f" for frames).
    """

    query: str
    answer: str
    probability: float
    margin: float
    score: float
    scores: dict[str, float]
    probabilities: dict[str, float]
    start: float | None = None
    stop: float | None = None
    unit: str | None = None


def answers_of(
    queries: Sequence[str], prediction: Prediction, threshold: float | None, timeline: Timeline | None = None
) -> list[Answer]:
    """Returns the answer to each of Q queries, or to each window of a timeline.

    Args:
        queries: names of the Q queries.
        prediction: their scores.
        threshold: a query whose best score is lower is rejected; None accepts all queries.
        timeline: the windows, if the queries are windows of a video.
    """
    windows: list[dict[str, Any]] = [{}] * len(queries)
    if timeline is not None:
        ends = zip(timeline.starts.tolist(), timeline.stops.tolist(), strict=True)
        windows = [{"start": round(start, 3), "stop": round(stop, 3), "unit": timeline.unit} for start, stop in ends]
    columns = (prediction.labels, prediction.margins.tolist(), prediction.scores.tolist())
    rows = zip(queries, *columns, prediction.probabilities.tolist(), windows, strict=True)
    return [
        Answer(
            query=query,
            answer=NONE if threshold is not None and max(scores) < threshold else label,
            probability=max(probabilities),
            margin=margin,
            score=max(scores),
            scores=dict(zip(prediction.classes, scores, strict=True)),
            probabilities=dict(zip(prediction.classes, probabilities, strict=True)),
            **window,
        )
        for query, label, margin, scores, probabilities, window in rows
    ]


def as_text(answer: Answer) -> str:
    """Returns the answer to one query and its most probable classes as a table."""
    ranked = sorted(answer.probabilities.items(), key=lambda item: -item[1])
    width = max(len(name) for name, _ in ranked[:MAX_SHOWN])
    lines = [f"{answer.query}: {answer.answer} (margin {answer.margin:.3f})"]
    lines += [f"  {name:{width}}  {probability:.3f}" for name, probability in ranked[:MAX_SHOWN]]
    if len(ranked) > MAX_SHOWN:
        lines.append(f"  and {len(ranked) - MAX_SHOWN} more classes")
    return "\n".join(lines)


def timeline_as_text(query: str, segments: Sequence[Segment], unit: str) -> str:
    """Returns the parts of a video, one line for each part with its answer."""
    places = 2 if unit == "s" else 0
    width = max(len(segment.answer) for segment in segments)
    end = len(f"{segments[-1].stop:.{places}f}")
    lines = [
        f"  {part.start:{end}.{places}f} - {part.stop:{end}.{places}f} {'s' if unit == 's' else 'frames'}  "
        f"{part.answer:{width}}  {part.probability:.3f}"
        for part in segments
    ]
    return "\n".join([f"{query}:", *lines])


def as_csv(answers: Sequence[Answer]) -> bytes:
    """Returns one line per answer, with the probability of each class in a column `p(<class>)`; UTF-8."""
    has_windows = answers[0].start is not None
    place = ["start", "stop", "unit"] if has_windows else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    classes = [f"p({name})" for name in answers[0].probabilities]
    writer.writerow(["query", *place, "answer", "probability", "margin", "score", *classes])
    for answer in answers:
        numbers = [answer.probability, answer.margin, answer.score, *answer.probabilities.values()]
        places = [getattr(answer, name) for name in place]
        writer.writerow([answer.query, *places, answer.answer, *(f"{number:.6g}" for number in numbers)])
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def as_records(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns the answers as plain values for JSON; start and stop only for windows."""
    return [{key: value for key, value in vars(answer).items() if value is not None} for answer in answers]
