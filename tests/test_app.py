"""`run/app.py`: the page classifies uploaded clips through its client API, within limits, and deletes them."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fsar
from episodes.preparation.names import prompt_of
from run import app
from run.command import exit_code_of
from tests.helpers.tiny_dataset import TinyDataset
from utils.errors import StopRequested, UserError

gradio_client = pytest.importorskip("gradio_client", reason="needs gradio (requirements-app.txt)")
pytest.importorskip("gradio", reason="needs gradio (requirements-app.txt)")

HOST, API = "127.0.0.1", "/classify"


@pytest.fixture(scope="module")
def classifier() -> fsar.Classifier:
    torch.manual_seed(0)
    return fsar.Classifier(fsar.build("otam", BACKBONE="tiny", CLIP_WEIGHTS="random", image_size=32), "cpu")


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder; the environment is restored after the test."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture
def page(tiny_dataset: TinyDataset, classifier, uploads, monkeypatch) -> Iterator[Any]:
    """Returns the page with an example from the tiny data set; uploads of at most 1 MB."""
    monkeypatch.chdir(tiny_dataset.videos)
    monkeypatch.setattr(app, "DEMO", tiny_dataset.videos)
    served = app.serve(classifier, uploads, HOST, None, max_mb=1, seconds=60)
    yield served
    served.close()


def clip(data: TinyDataset, class_number: int, number: int = 0) -> Path:
    name = f"test_action_{class_number}"
    return data.videos / name / f"{name}_{number:02d}.mp4"


def test_page_returns_the_classifiers_probabilities(tiny_dataset, classifier, uploads, page):
    support = {f"test_action_{number}": [clip(tiny_dataset, number)] for number in (0, 1)}
    query = clip(tiny_dataset, 0, 1)
    client = gradio_client.Client(page.local_url, verbose=False)
    files = [[gradio_client.handle_file(path) for path in paths] for paths in support.values()]
    fields = [*support, "", "", "", *files, None, None, None]
    ranking, frames, pairing = client.predict(gradio_client.handle_file(query), *fields, api_name=API)
    example = client.predict(api_name="/example")
    with pytest.raises(Exception, match="expected a clip"):
        client.predict(None, *fields, api_name=API)
    expected = classifier.fit(support, {name: prompt_of(name) for name in support}).predict([query])
    found = {row["label"]: row["confidence"] for row in ranking["confidences"]}
    assert [found[name] for name in support] == pytest.approx(expected.probabilities[0].tolist(), abs=1e-5)
    assert example[1] in {folder.name for folder in tiny_dataset.videos.iterdir()}
    assert frames
    assert pairing
    assert list(uploads.rglob("*.mp4"))


@pytest.mark.parametrize("matcher", ["otam", "mean"])
def test_alignment_is_shown_only_for_a_method_that_pairs_frames(matcher, tiny_dataset, uploads):
    options = {"BACKBONE": "tiny", "CLIP_WEIGHTS": "random", "MATCHER": matcher}
    model = fsar.build("otam", image_size=32, **options)
    page = app.serve(fsar.Classifier(model, "cpu"), uploads, HOST, None, max_mb=1, seconds=60)
    page.close()
    classify = next(function.fn for function in page.fns.values() if function.api_name == "classify")
    clips = [[str(clip(tiny_dataset, number))] for number in (0, 1)]
    *_, pairing, alignment = classify(str(clip(tiny_dataset, 0, 1)), "one", "two", "", "", "", *clips, None, None, None)
    assert (pairing is not None) == (matcher == "otam")
    assert alignment.visible == (matcher == "otam")


def test_a_file_above_the_limit_is_refused_and_deleted(tmp_path, tiny_dataset, uploads, page):
    large = tmp_path / "large.mp4"
    large.write_bytes(clip(tiny_dataset, 0).read_bytes() + bytes(2_000_000))
    client = gradio_client.Client(page.local_url, verbose=False)
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(gradio_client.handle_file(large), *[""] * 5, *[None] * 5, api_name=API)
    assert sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file()) < 1_000_000


def test_wrong_classes_and_clips_are_reported_in_one_sentence(tiny_dataset, classifier, tmp_path):
    one, query = [str(clip(tiny_dataset, 0))], str(clip(tiny_dataset, 1))
    text = tmp_path / "notes.mp4"
    text.write_text("not a video", encoding="utf-8")
    for names, files, to_classify, seconds, fact in [
        (["wave"], [one], query, 60, "wave"),
        (["wave", "wave"], [one, one], query, 60, "'wave'"),
        (["wave", ""], [one, one], query, 60, "unnamed"),
        (["wave", "clap"], [one, None], query, 60, "'clap'"),
        (["wave", "clap"], [one * (app.MAX_SHOTS + 1), one], query, 60, str(app.MAX_SHOTS)),
        (["wave", "clap"], [one, one], None, 60, "classify"),
        (["wave", "clap"], [one, one], query, 0.01, "--max-seconds"),
        (["wave", "clap"], [one, one], str(text), 60, "notes.mp4"),
    ]:
        with pytest.raises(UserError, match=fact):
            app.answer(classifier, to_classify, names, files, seconds)


def test_a_port_in_use_is_reported_in_one_sentence(classifier, uploads):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}.*--port"):
            app.serve(classifier, uploads, HOST, port, max_mb=1, seconds=60)


def test_uploads_are_deleted_when_the_command_ends(tiny_dataset, classifier, uploads, monkeypatch):
    """A signal ends the command while it waits, after a clip was uploaded."""
    served, kept = [], []

    def upload_and_stop() -> None:
        client = gradio_client.Client(served[0].local_url, verbose=False)
        uploaded = gradio_client.handle_file(clip(tiny_dataset, 0))
        with pytest.raises(Exception, match="unnamed"):
            client.predict(None, *[""] * 5, [uploaded], *[None] * 4, api_name=API)
        kept.extend(uploads.rglob("*.mp4"))
        raise StopRequested("stopped", 75)

    def serve(*arguments: Any) -> Any:
        served.append(real_serve(*arguments))
        return served[0]

    real_serve = app.serve
    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(fsar, "load", lambda *arguments: classifier.model)
    monkeypatch.setattr(tempfile, "tempdir", str(uploads))
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(app, "wait_until_stopped", upload_and_stop)
    assert exit_code_of(lambda: app.main(["--checkpoint", __file__, "--port", str(port), "--device", "cpu"])) == 75
    assert kept
    assert not list(uploads.iterdir())


@pytest.mark.parametrize(
    "words", [["--port", "0"], ["--port", "65536"], ["--max-mb", "0"], ["--max-seconds", "nan"], ["--max-seconds", "0"]]
)
def test_limits_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        app.main(["--checkpoint", __file__, *words])
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err
