"""Builds the page of a comparison: tables, and frames of the queries that only one side gets right; one HTML file."""

import base64
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from episodes.dataset import ClipOptions, VideoDataset
from episodes.splits import SplitIndex
from run.compare import format_differences, format_number, format_task
from run.comparison import Comparison, Side
from run.data import clip_options, load_splits_of
from utils.config import config_from_dict
from utils.errors import UserError

MAX_QUERIES = 12  # per side, shown with frames
FRAME_HEIGHT = 96  # pixels
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Comparison</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #8886 }
th:first-child, td:first-child, .text { text-align: left; overflow-wrap: break-word }
.spaced { white-space: pre-wrap }
figure { margin: 1rem 0 } figcaption { font-weight: 600 }
img { display: block; max-width: 100% }
.bar { display: inline-block; height: .8rem } .first { background: #d55e00 } .second { background: #0072b2 }
.strip { margin: .2rem 0 .6rem } small { opacity: .75 }
</style></head><body>
<h1>Comparison</h1>
<p>{{ task }}</p>
<table><tr><th>side</th><th>accuracy %</th><th>± episodes</th>
<th>± videos</th><th>sd over seeds</th><th class="text">runs</th></tr>
{% for side in summary.sides -%}
<tr><td>{{ side.side }}: {{ side.label }}</td><td>{{ number(side.accuracy) }}</td>
<td>{{ number(side.interval_95) }}</td>
<td>{{ number(side.interval_95_videos) }}</td><td>{{ number(side.standard_deviation_over_runs) }}</td>
<td class="text">{{ side.runs | join(", ") }}</td></tr>
{% endfor %}</table>
{% for note in summary.notes %}<p>Note: {{ note }}</p>{% endfor %}
{% for part in parts %}{% set first, second = part.numbers.sides %}
<h2>{{ second }} - {{ first }}: {{ "%+.2f" | format(part.numbers.difference) }} points</h2>
<table>{% for name, text in part.differences %}
<tr><td>{{ name }}</td><td class="text spaced">{{ text }}</td></tr>{% endfor %}
<tr><td>classes</td><td class="text">{{ first }} ahead in {{ part.numbers.wins[first] }}, {{ second }} in
{{ part.numbers.wins[second] }}, equal in {{ part.numbers.wins.equal }}</td></tr></table>
<table><tr><th>class</th><th>queries</th><th>{{ first }} %</th><th>{{ second }} %</th>
<th>{{ second }} - {{ first }}</th><th></th></tr>
{% for row in part.numbers.classes -%}
<tr><td>{{ row.class }}</td><td>{{ row.queries }}</td>
<td>{{ number(row[first]) }}</td><td>{{ number(row[second]) }}</td><td>{{ "%+.2f" | format(row.difference) }}</td>
<td class="text"><span class="bar {{ "first" if row.difference < 0 else "second" }}"
style="width: {{ (row.difference | abs) * 2 }}px"></span></td></tr>
{% endfor %}</table>
{% for side in part.queries %}
<h3>Only {{ side.right }} is right: {{ "{:,}".format(side.count) }} queries</h3>
{% for query in side.shown -%}
<figure><figcaption>{{ query.video }}: in {{ query.only_right }} of {{ query.queries }} episodes, for example in
episode {{ query.episode }}</figcaption>
{% for strip in query.strips -%}
<div class="strip"><small>{{ strip.caption }}</small>
<img alt="frames of {{ strip.video }}" src="{{ strip.image }}"></div>
{% endfor %}</figure>
{% endfor %}{% endfor %}{% endfor %}
</body></html>
"""


def page(summary: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
    """Returns the HTML page of a comparison, with frames read by the config of the first run.

    Raises:
        UserError: the videos are missing, or are not those of the results.
    """
    strip = film_strips(comparisons[0].first.runs[0].results)
    parts = [
        {
            "numbers": numbers,
            "differences": format_differences(numbers),
            "queries": [
                {
                    "right": side.letter,
                    "count": numbers["only_right"][side.letter],
                    "shown": _queries(comparison, side, numbers["videos"][side.letter][:MAX_QUERIES], strip),
                }
                for side in (comparison.first, comparison.second)
            ],
        }
        for numbers, comparison in zip(summary["comparisons"], comparisons, strict=True)
    ]
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(summary=summary, task=format_task(summary), parts=parts, number=format_number)


def _queries(
    comparison: Comparison, right: Side, videos: Sequence[dict[str, Any]], strip: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Returns for each query video the first episode that only one side gets right, with supports of two classes."""
    wrong = comparison.second if right is comparison.first else comparison.first
    answers, only = right.runs[0].answers, comparison.only_right(right)
    chosen = wrong.runs[0].answers.scores[wrong.runs[0].results["protocol"]].argmax(axis=-1)
    numbers = {name: video for video, name in enumerate(answers.videos.tolist())}
    queries = []
    for row in videos:
        episode, query = np.argwhere(only & (answers.query == numbers[row["video"]]))[0]
        supports = {
            "support of the true class": answers.support[episode, answers.labels[episode, query], 0],
            f"support of the class that {wrong.letter} chose": answers.support[episode, chosen[episode, query], 0],
        }
        strips = [
            {"caption": f"{caption}: {answers.videos[video]}", "video": answers.videos[video], "image": strip(video)}
            for caption, video in {"query": answers.query[episode, query], **supports}.items()
        ]
        queries.append({**row, "episode": int(episode), "strips": strips})
    return queries


def film_strips(results: dict[str, Any]) -> Callable[[int], str]:
    """Returns a function that renders the test clip of a video, as the model sees it, as one picture in a data URI.

    Args:
        results: content of the results.json of a test run; its config names the data.

    Raises:
        UserError: the videos are missing, or not those of the results.
    """
    if "config" not in results:
        raise UserError("results.json has no config, so no frames can be shown; run the test again, or omit --html")
    config = config_from_dict(results["config"], "the config in results.json")
    index = load_splits_of(config, [results["split"]])[results["split"]]
    if index.digest() != results["split_sha256"]:
        raise UserError(f"the videos in {index.root} are not those of the results, so no frames can be shown")
    options = clip_options(config)
    return functools.cache(lambda video: _film_strip(index, options, int(video)))


def _film_strip(index: SplitIndex, options: ClipOptions, video: int) -> str:
    clip = VideoDataset(index, options, [video])[0]
    picture = Image.fromarray(np.concatenate(list(clip.permute(0, 2, 3, 1).numpy()), axis=1))
    if picture.height > FRAME_HEIGHT:
        picture = picture.resize((picture.width * FRAME_HEIGHT // picture.height, FRAME_HEIGHT))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
