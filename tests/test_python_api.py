"""`fsar`, the public Python API: it gives the scores of a test run, and its documentation runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fsar
from episodes.dataset import VideoDataset
from episodes.video import read_frames
from run.main_run import Learner
from tests.helpers.released import learner_of, released_content
from tests.helpers.shipped import ROOT, SHIPPED, tiny_options
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import trained
from utils.checkpoint import BEST, load_checkpoint
from utils.config import save_config

PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/python.md")]
CODE = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]


@pytest.fixture(scope="module")
def learner(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Returns a finished run of CLIP-SPM, 3-way 2-shot, on cropped pixels that are not normalised."""
    data = ("DATA.SHORT_SIDE=36", "DATA.IMG_NORM=false")
    return trained(tiny_dataset, tmp_path_factory.mktemp("api") / "run", "TRAIN.SHOT=2", *data)


@pytest.fixture(scope="module")
def checkpoint(learner: Learner) -> Path:
    return learner.directory.path / BEST


def test_scores_equal_those_of_a_test_run(learner, checkpoint):
    index = learner.data.splits["test"]
    spec = learner.data.samplers["test"].episode(0)
    names = [index.classes[class_id].folder for class_id in spec.class_ids]
    support = {name: [index.path(v) for v in videos] for name, videos in zip(names, spec.support, strict=True)}
    texts = {name: index.classes[class_id].prompt for name, class_id in zip(names, spec.class_ids, strict=True)}
    queries = [index.path(video) for video in spec.query]
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu").fit(support, texts)
    prediction, explanation = classifier.predict(queries), classifier.explain(queries[0])
    assert prediction.classes == tuple(names)

    learner.model.load_state_dict(load_checkpoint(checkpoint)["model"])
    learner.model.eval()
    clips = list(VideoDataset(index, learner.validation_reader.options, [*spec.support.ravel(), *spec.query]))
    with torch.no_grad():
        features = learner.encoder(torch.stack(clips))
        parts = features[: 3 * 2].unflatten(0, (1, 3, 2)), features[3 * 2 :][None]
        class_text = learner.text["test"][torch.from_numpy(spec.class_ids)][None]
        expected = learner.model.score(*parts, class_text, "inductive")
        explained = learner.model.explain(parts[0], parts[1][:, :1], class_text)
    torch.testing.assert_close(prediction.scores, expected[0], rtol=1e-4, atol=1e-4)
    assert prediction.labels == [names[best] for best in expected[0].argmax(-1).tolist()]
    torch.testing.assert_close(explanation.pairings, explained.pairings, rtol=1e-3, atol=1e-3)


def test_arrays_and_files_give_the_same_scores_for_each_query_alone(learner, checkpoint):
    index = learner.data.splits["test"]
    paths = [index.path(videos[0]) for videos in index.videos_of_class[:3]]
    arrays = [read_frames(path, np.arange) for path in paths]
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu")
    from_files = classifier.fit({"a": paths[:1], "b": paths[1:2]}).predict(paths).scores
    from_arrays = classifier.fit({"a": arrays[:1], "b": arrays[1:2]}).predict(arrays).scores
    assert torch.equal(from_files, from_arrays)
    torch.testing.assert_close(classifier.predict(arrays[2:]).scores, from_arrays[2:], rtol=1e-4, atol=1e-4)


def test_clips_of_a_smaller_class_are_repeated_in_order(learner, checkpoint):
    index = learner.data.splits["test"]
    first, second, third = (index.path(video) for video in index.videos_of_class[0][:3])
    others = [index.path(video) for video in index.videos_of_class[1][:3]]
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu")
    for few, repeated in (([first], [first] * 3), ([first, second], [first, second, first])):
        found = classifier.fit({"a": few, "b": others}).predict([second, third]).scores
        expected = classifier.fit({"a": repeated, "b": others}).predict([second, third]).scores
        assert torch.equal(found, expected)
    assert not torch.equal(found, classifier.fit({"a": [second, first], "b": others}).predict([second, third]).scores)


def test_a_loaded_model_is_in_evaluation_mode(checkpoint):
    assert not [module for module in fsar.load(checkpoint).modules() if module.training]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_method_built_in_python_encodes_and_scores_clips(name):
    model = fsar.build(name, image_size=32, **tiny_options(name)).train()
    rng = np.random.default_rng(0)
    clips = list(rng.integers(0, 256, (6, 10, 40, 48, 3), dtype=np.uint8))
    classifier = fsar.Classifier(model, "cpu").fit({"wave": clips[:2], "clap": clips[2:4]})
    prediction = classifier.predict(clips[4:])
    assert torch.equal(classifier.predict(clips[4:]).scores, prediction.scores)  # without dropout
    assert prediction.scores.shape == (2, 2)
    assert set(prediction.labels) <= {"wave", "clap"}
    assert model.data.SHORT_SIDE >= model.data.IMG_SIZE == 32


def test_mistakes_are_reported_as_in_a_config():
    for options, facts in [
        ({"BACKBON": "tiny"}, ["MODEL.BACKBON", "MODEL.BACKBONE"]),
        ({"HSMR": {"ENABLED": 3}}, ["MODEL.HSMR.ENABLED", "3"]),
    ]:
        with pytest.raises(fsar.UserError) as refused:
            fsar.build("clipspm", **options)
        assert all(fact in str(refused.value) for fact in facts)
    for name in ("clipsmp", "CLIPSPM"):
        with pytest.raises(fsar.UserError, match=rf"{name}.*did you mean clipspm"):
            fsar.build(name)
    for size in (0, "64"):
        with pytest.raises(fsar.UserError, match=f"image_size.*{size}"):
            fsar.build("otam", image_size=size)


def test_wrong_supports_and_clips_are_refused(checkpoint, tmp_path):
    frames = np.zeros((4, 40, 40, 3), np.uint8)
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu")
    with pytest.raises(fsar.UserError, match="fit"):
        classifier.predict([frames])
    for support in ({}, {"a": [frames]}, {"a": [frames], "b": []}):
        with pytest.raises(fsar.UserError, match="classes with at least one clip"):
            classifier.fit(support)
    with pytest.raises(fsar.UserError, match="jump"):
        classifier.fit({"a": [frames], "b": [frames]}, texts={"jump": "jumping"})
    with pytest.raises(fsar.UserError, match=r"'b'.*3"):
        classifier.fit({"a": [frames], "b": [frames]}, texts={"b": 3})
    with pytest.raises(fsar.UserError, match=r"name of each class.*7"):
        classifier.fit({"a": [frames], 7: [frames]})
    odd = [(frames.astype(float), "float64"), (frames[0], "40"), (frames[:, :0], "0, 40"), (None, "None"), (3, "int")]
    for clip, fact in [*odd, (tmp_path / "none.mp4", "none.mp4")]:
        with pytest.raises(fsar.UserError, match=fact):
            classifier.fit({"a": [frames], "b": [clip]})


def test_a_failed_fit_keeps_the_earlier_classes(checkpoint):
    frames = np.zeros((4, 40, 40, 3), np.uint8)
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu")
    with pytest.raises(fsar.UserError, match="fit"):
        classifier.explain(frames)
    classifier.fit({"a": [frames], "b": [frames + 9]})
    expected = classifier.predict([frames])
    with pytest.raises(fsar.UserError, match=r"none\.mp4"):
        classifier.fit({"c": [frames], "d": ["none.mp4"]})
    assert classifier.predict([frames]).classes == expected.classes == ("a", "b")


def test_a_text_in_place_of_a_list_is_named_and_not_its_letters(checkpoint):
    frames = np.zeros((4, 40, 40, 3), np.uint8)
    classifier = fsar.Classifier(fsar.load(checkpoint), "cpu")
    with pytest.raises(fsar.UserError, match=r"\['clip\.mp4'\]"):
        classifier.fit({"a": [frames], "b": "clip.mp4"})
    classifier.fit({"a": [frames], "b": [frames + 9]})
    with pytest.raises(fsar.UserError, match=r"\['clip\.mp4'\]"):
        classifier.predict(Path("clip.mp4"))
    with pytest.raises(fsar.UserError, match=r"\['MODEL\.SEED=3'\]"):
        fsar.load(checkpoint, overrides="MODEL.SEED=3")


def test_a_wrong_checkpoint_or_device_is_refused_before_the_backbone_is_read(checkpoint, tmp_path):
    config = tmp_path / "clip.yaml"
    config.write_text("MODEL: {NAME: otam, BACKBONE: RN50, CLIP_WEIGHTS: none.pt}\n")
    for path in (tmp_path / "none.pt", checkpoint.parent):
        with pytest.raises(fsar.UserError, match=re.escape(f"no such checkpoint: {path}")):
            fsar.load(path, config)
    with pytest.raises(fsar.UserError, match="gpu"):
        fsar.Classifier(fsar.load(checkpoint), "gpu")


def test_a_released_checkpoint_loads_with_its_config(tiny_dataset, tmp_path):
    learner = learner_of("clipspm", tiny_dataset, tmp_path / "run")
    path, config = tmp_path / "released.pt", tmp_path / "run.yaml"
    torch.save(released_content(learner, "clipspm"), path)
    save_config(learner.config, config)
    with pytest.raises(fsar.UserError, match="config"):
        fsar.load(path)
    loaded = fsar.load(path, config)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_overrides_take_precedence_over_a_stored_and_a_given_config(learner, checkpoint, tmp_path):
    file, length = tmp_path / "run.yaml", learner.config.DATA.SEQ_LEN
    save_config(learner.config, file)
    for config in (None, file):
        loaded = [fsar.load(checkpoint, config, given) for given in ([], [f"DATA.SEQ_LEN={length + 1}"])]
        assert [model.data.SEQ_LEN for model in loaded] == [length, length + 1]


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_code_in_the_documentation_runs(code, learner, checkpoint, tmp_path, monkeypatch, capsys):
    index = learner.data.splits["test"]
    for number, place in enumerate(re.findall(r'"([^"]+\.mp4)"', code)):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(index.path(number))
    for place in re.findall(r'"(checkpoints/[^"]+)"', code):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/python.md", "exec"), {})
