"""`run/app.py`: the page classifies uploaded clips through its client API, within limits, and deletes them."""

import pytest

import fsar
from episodes.preparation.names import prompt_of
from run import app
from tests.conftest import TinyDataset
from tests.test_learner import trained
from utils.checkpoint import BEST
from utils.errors import UserError

gradio_client = pytest.importorskip("gradio_client", reason="needs gradio (requirements-app.txt)")
pytest.importorskip("gradio", reason="needs gradio (requirements-app.txt)")


def test_page_gives_the_classifiers_probabilities(tiny_dataset: TinyDataset, tmp_path, monkeypatch):
    learner = trained(tiny_dataset, tmp_path / "run")
    classifier = fsar.Classifier(fsar.load(learner.directory.path / BEST), "cpu")
    folders = [tiny_dataset.videos / f"test_action_{number}" for number in (0, 1)]
    support = {folder.name: [folder / f"{folder.name}_00.mp4"] for folder in folders}
    query = folders[0] / "test_action_0_01.mp4"
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.chdir(tiny_dataset.videos)
    monkeypatch.setattr(app, "DEMO", tiny_dataset.videos)
    page = app.serve(classifier, uploads, "127.0.0.1", None, most_mb=10, seconds=60)
    try:
        client = gradio_client.Client(page.local_url, verbose=False)
        files = [[gradio_client.handle_file(path) for path in paths] for paths in support.values()]
        fields = [*support, "", "", "", *files, None, None, None]
        ranking, frames, pairing = client.predict(gradio_client.handle_file(query), *fields, api_name="/classify")
        example = client.predict(api_name="/example")
        with pytest.raises(Exception, match="expected a clip"):
            client.predict(None, *fields, api_name="/classify")
    finally:
        page.close()
    expected = classifier.fit(support, {name: prompt_of(name) for name in support}).predict([query])
    found = {row["label"]: row["confidence"] for row in ranking["confidences"]}
    assert [found[name] for name in support] == pytest.approx(expected.probabilities[0].tolist(), abs=1e-5)
    assert example[1] in {folder.name for folder in tiny_dataset.videos.iterdir()}
    assert frames
    assert pairing
    assert list(uploads.rglob("*.mp4"))
    with pytest.raises(UserError, match="--max-seconds"):
        app.read(classifier, str(query), seconds=0.01)
