"""`run/export.py`: the exported encoder gives the model's features for any number of clips, or nothing is written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fsar
from models.base import FewShotModel
from models.model_otam import Otam
from run import encoder_export
from run.command import exit_code_of
from run.encoder_export import noise
from run.export import describe_export, main, parse_arguments
from tests.helpers.shipped import METHODS, tiny_options
from utils.checkpoint import file_digest, save_checkpoint
from utils.config import config_from_dict, config_to_dict

FEWER_LAYERS = {"a2m2": {"TEMPORAL_SCALES": [1, 2], "SPATIAL_SCALES": [1]}, "d2st": {"D2ST": {"BLOCKS": 1}}}  # to trace
SIZE, FRAMES = 32, 4
CLIP = [FRAMES, 3, SIZE, SIZE]


def checkpoint_of(method: str, folder: Path, **options: object) -> Path:
    """Returns a checkpoint of a method with the tiny backbone and random weights."""
    torch.manual_seed(0)
    section = {"NAME": method, **tiny_options(method), **FEWER_LAYERS.get(method, {}), **options}
    data = {"IMG_SIZE": SIZE, "SHORT_SIDE": SIZE, "SEQ_LEN": FRAMES}
    config = config_from_dict({"MODEL": section, "DATA": data}, "the test")
    model = fsar.build(config.MODEL, SIZE)
    path = folder / f"{method.replace(':', '_')}.pt"
    save_checkpoint(path, {"model": model.state_dict(), "config": config_to_dict(config), "episode": 0})
    return path


def export(checkpoint: Path, output: Path, *words: str) -> int:
    """Runs the command and returns its exit code."""
    return exit_code_of(lambda: main(["--checkpoint", str(checkpoint), "--output", str(output), *words]))


def expected_features(checkpoint: Path, clips: torch.Tensor) -> torch.Tensor:
    """Returns the model's features, with its normalisation written out."""
    model = fsar.load(checkpoint)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixel_mean, model.pixel_std))
    with torch.no_grad():
        return model.encode((clips / 255 - mean) / std)


@pytest.fixture
def _each_file_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads equal files once; the command loads the program that it writes, which takes most of the time."""
    load, programs = torch.export.load, {}

    def load_once(file: Path) -> torch.export.ExportedProgram:
        content = file.read_bytes()
        if content not in programs:
            programs[content] = load(file)
        return programs[content]

    monkeypatch.setattr(torch.export, "load", load_once)


@pytest.mark.usefixtures("_each_file_is_loaded_once")
@pytest.mark.parametrize("method", METHODS)
def test_an_exported_program_encodes_any_number_of_clips(method, tmp_path):
    checkpoint, output = checkpoint_of(method, tmp_path), tmp_path / "new" / "exported"
    assert export(checkpoint, output) == 0
    about = json.loads((output / "export.json").read_bytes())
    program = torch.export.load(output / about["file"])
    assert all(node.users for node in program.graph.find_nodes(op="placeholder")), (
        "weights that the encoder never reads"
    )
    encode = program.module()
    for videos in (1, 5):
        clips = noise(videos, CLIP)
        expected = expected_features(checkpoint, clips)
        torch.testing.assert_close(encode(clips), expected, rtol=1e-5, atol=1e-5)
        assert about["output"]["shape"] == ["videos", *expected.shape[1:]]
    assert about["input"]["shape"] == ["videos", *CLIP]
    assert about["method"] == method
    assert about["checkpoint_sha256"] == file_digest(checkpoint)
    assert about["largest_difference"] < 1e-4


def test_a_model_without_normalisation_is_exported_without_it(tmp_path):
    checkpoint, output = checkpoint_of("otam", tmp_path), tmp_path / "exported"
    assert export(checkpoint, output, "DATA.IMG_NORM=false") == 0
    clips = noise(2, CLIP)
    encode = torch.export.load(output / json.loads((output / "export.json").read_bytes())["file"]).module()
    with torch.no_grad():
        expected = fsar.load(checkpoint).encode(clips / 255)
    torch.testing.assert_close(encode(clips), expected, rtol=1e-5, atol=1e-5)


def test_the_description_has_the_preparation_of_a_clip(tmp_path):
    overrides = ["DATA.SHORT_SIDE=40", "DATA.SAMPLING=segments"]
    expected = {"frames": FRAMES, "sampling": "segments", "short_side": 40, "crop": SIZE}
    words = ["--checkpoint", str(checkpoint_of("otam", tmp_path)), "--output", str(tmp_path / "exported")]
    for normalised in (True, False):
        options = parse_arguments([*overrides, f"DATA.IMG_NORM={str(normalised).lower()}", *words])
        model = fsar.load(options.checkpoint, overrides=options.overrides)
        pixels = {"pixel_mean": list(model.pixel_mean), "pixel_std": list(model.pixel_std)}
        expected |= pixels if normalised else dict.fromkeys(pixels)
        about = describe_export(model, options)
        assert {name: about[name] for name in expected} == expected


@pytest.mark.parametrize("method", ["clipspm", "hyrsm", "molo"])
def test_an_onnx_graph_encodes_any_number_of_clips(method, tmp_path):
    for package in encoder_export.ONNX_PACKAGES:
        pytest.importorskip(package, reason="pip install -r requirements-export.txt")
    import onnxruntime

    checkpoint, output = checkpoint_of(method, tmp_path), tmp_path / "exported"
    assert export(checkpoint, output, "--format", "onnx") == 0
    about = json.loads((output / "export.json").read_bytes())
    session = onnxruntime.InferenceSession(output / about["file"])
    for videos in (1, 5):
        clips = noise(videos, CLIP)
        (found,) = session.run([about["output"]["name"]], {about["input"]["name"]: clips.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected_features(checkpoint, clips), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", [(7, 7), (14, 9), (3, 8)])
def test_pooling_for_onnx_equals_pytorchs(sides):
    maps = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    found, _ = encoder_export.adaptive_max_pool(maps, (4, 4))
    assert torch.equal(found, torch.nn.functional.adaptive_max_pool2d(maps, (4, 4)))


def test_missing_onnx_packages_are_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(checkpoint_of("otam", tmp_path), tmp_path / "exported", "--format", "onnx") == 2
    message = capsys.readouterr().err
    assert "onnx;" in message
    assert "requirements-export.txt" in message
    assert not (tmp_path / "exported").exists()


def test_an_operator_missing_from_onnx_is_named(tmp_path, monkeypatch, capsys):
    def write(program, file):
        try:
            raise RuntimeError(
                "No ONNX function found for <OpOverload(op='aten.adaptive_max_pool2d', overload='default')>"
            )
        except RuntimeError as error:
            raise RuntimeError("\x1b[96mThis is step 3/3\x1b[0m of exporting the model to ONNX.") from error

    monkeypatch.setitem(encoder_export.WRITERS, "onnx", write)
    monkeypatch.setattr(encoder_export, "require_onnx", lambda: None)
    assert export(checkpoint_of("otam", tmp_path), tmp_path / "exported", "--format", "onnx") == 2
    message = capsys.readouterr().err
    assert "aten.adaptive_max_pool2d" in message
    assert "--format torch" in message
    assert message.rstrip("\n").isprintable()
    assert not (tmp_path / "exported").exists()


def test_text_features_equal_the_models_in_class_order(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_export, "export_encoder", lambda model, to, folder: {"largest_difference": 0.0})
    checkpoint, file = checkpoint_of("clipspm", tmp_path), tmp_path / "classes.yaml"
    file.write_text("wave: waving a hand\nclap: clapping\n", encoding="utf-8")
    for output, words, names, prompts in [
        ("named", ["run_fast", "clap"], ["run_fast", "clap"], ["run fast", "clap"]),
        ("listed", [str(file)], ["wave", "clap"], ["waving a hand", "clapping"]),
    ]:
        assert export(checkpoint, tmp_path / output, "--classes", *words) == 0
        about = json.loads((tmp_path / output / "export.json").read_bytes())
        assert (about["classes"], about["texts"]) == (names, prompts)
        found = np.load(tmp_path / output / about["text_features"])
        np.testing.assert_allclose(found, fsar.load(checkpoint).class_text(prompts).numpy(), rtol=1e-5, atol=1e-6)


def test_wrong_classes_and_outputs_are_refused(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "there").mkdir()
    otam, clipspm = checkpoint_of("otam", tmp_path), checkpoint_of("clipspm", tmp_path)
    for checkpoint, output, words, fact in [
        (otam, "new", ["--classes", "a", "b"], "no class text"),
        (clipspm, "new", ["--classes", "jump", "run", "jump"], "'jump' twice"),
        (clipspm, "new", ["--classes", "jump", "Jump"], "same text feature"),
        (clipspm, "new", ["--classes", "jump", "MODEL.CLIP_WEIGHTS=demo"], "MODEL.CLIP_WEIGHTS=demo"),
        (clipspm, "new", ["--classes", str(tmp_path / "empty.yaml")], "empty.yaml"),
        (clipspm, "new", ["--classes", str(tmp_path / "none.yaml")], "none.yaml"),
        (clipspm, "there", [], "there"),
        (tmp_path / "none.pt", "new", [], "none.pt"),
    ]:
        assert export(checkpoint, tmp_path / output, *words) == 2
        assert fact in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())


def of_two_videos(model: FewShotModel, frames: torch.Tensor) -> torch.Tensor:
    """Counts videos in Python, which traces their number as a constant."""
    return model.encoder(frames) * len(range(len(frames)))


def several_outputs(model: FewShotModel, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return frames, model.encoder(frames)


def by_value(model: FewShotModel, frames: torch.Tensor) -> torch.Tensor:
    """Depends on the pixels in a way that cannot be traced."""
    return model.encoder(frames) if frames.mean().item() > 0 else model.encoder(-frames)


@pytest.mark.parametrize("encode", [of_two_videos, several_outputs, by_value])
def test_a_failed_export_is_reported_in_one_sentence(encode, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Otam, "encode", encode)
    assert export(checkpoint_of("otam", tmp_path), tmp_path / "exported") == 2
    message = capsys.readouterr().err
    assert "Otam cannot be exported" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["otam.pt"]


def test_nothing_is_written_if_features_differ_from_the_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoder_export, "normalise", lambda clips, mean, std: clips.float() / 255)
    assert export(checkpoint_of("otam", tmp_path), tmp_path / "exported") == 2
    message = capsys.readouterr().err
    assert "Otam" in message
    assert str(encoder_export.TOLERANCE) in message
    assert [path.name for path in tmp_path.iterdir()] == ["otam.pt"]


def test_a_backbone_set_to_save_memory_or_time_is_exported(tmp_path):
    checkpoint = checkpoint_of("otam", tmp_path, COMPILE=True, ACTIVATION_CHECKPOINTING=True)
    assert export(checkpoint, tmp_path / "exported") == 0
