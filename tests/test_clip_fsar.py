"""The CLIP base model: backbones, sources of weights, batch norm, and the dropped text tower."""

import gc
import weakref
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import nn

from models.clip_fsar import ClipTowers, _tokenizer
from models.torchscript import is_torchscript
from utils.errors import UserError
from utils.schema import ModelOptions

SMALL = "small-test-clip"
SMALL_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
IGNORE_TRACING = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
HUB_PAGE = "somebody/small-test-clip"


def towers(backbone: str, weights: str | Path = "random", image_size: int = 64, **options: bool) -> ClipTowers:
    return ClipTowers(ModelOptions(BACKBONE=backbone, CLIP_WEIGHTS=str(weights), **options), image_size)


def refusal(*arguments, **options) -> str:
    """Returns the error message of the towers, one sentence."""
    with pytest.raises(UserError) as refused:
        towers(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def tags(monkeypatch) -> dict[str, dict]:
    """Adds a small model to open_clip, and returns its sets of weights, which a test may change."""
    entries: dict[str, dict] = {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, SMALL, SMALL_CONFIG)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALL, entries)
    return entries


@pytest.fixture
def small_clip(tags) -> nn.Module:
    """Returns the small model with random weights, as if it was trained."""
    torch.manual_seed(7)
    return open_clip.create_model(SMALL).eval()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """Returns an empty cache of the hub and disables the network."""
    # The hub's client reads its environment variables only when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def same_weights(found: ClipTowers, expected: nn.Module) -> bool:
    """Returns whether both towers hold the weights of `expected`."""
    state, wanted = found._text_tower[0].state_dict(), expected.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def put_into_cache(cache: Path, clip: nn.Module) -> None:
    """Writes a model's weights to the location of the hub client's download."""
    folder = cache / f"models--{HUB_PAGE.replace('/', '--')}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    save_file(clip.state_dict(), folder / "snapshots/abc/open_clip_model.safetensors")


# Backbones


@pytest.mark.parametrize(("backbone", "width"), [("RN50", 1024), ("ViT-B/16", 512)])
def test_published_backbones_encode_frames_to_their_width(backbone, width):
    model = towers(backbone, image_size=224).eval()
    with torch.no_grad():
        features = model(torch.rand(1, 2, 3, 224, 224))
    assert model.width == width
    assert features.shape == (1, 2, width)
    assert features.isfinite().all()
    model.drop_text_tower()


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_tiny_backbone_encodes_each_frame_on_its_own(image_size):
    model = towers("tiny", image_size=image_size).eval()
    frames = torch.rand(2, 3, 3, image_size, image_size)
    features = model(frames)
    assert features.shape == (2, 3, model.width)
    torch.testing.assert_close(features[1, 2], model(frames[1:, 2:])[0, 0], rtol=1e-4, atol=1e-5)


def test_the_tiny_backbone_names_the_frame_size_it_needs():
    message = refusal("tiny", image_size=50)
    assert "DATA.IMG_SIZE" in message
    assert "multiple of" in message
    assert "found 50" in message


@pytest.mark.parametrize(("backbone", "smallest"), [("RN50", 32), ("ViT-B/32", 32), ("ViT-B/16", 16)])
def test_frames_smaller_than_a_patch_are_refused(backbone, smallest):
    options = ModelOptions(BACKBONE=backbone, CLIP_WEIGHTS="random")
    with torch.device("meta"):
        ClipTowers(options, smallest)
        with pytest.raises(UserError, match=rf"DATA\.IMG_SIZE is {smallest - 1}, .*{backbone}.* {smallest} pixels"):
            ClipTowers(options, smallest - 1)


@pytest.mark.parametrize(("wrong", "near"), [("ViT-B16", "ViT-B-16"), ("RN5O", "RN50"), ("tinny", "tiny")])
def test_an_unknown_backbone_is_refused_with_similar_names(wrong, near):
    message = refusal(wrong)
    assert f"MODEL.BACKBONE: {wrong!r}" in message
    assert near in message.split("for example", 1)[1]


# Missing weights


@pytest.mark.parametrize(("backbone", "file_name"), [("RN50", "RN50.pt"), ("ViT-B/16", "ViT-B-16.pt")])
@pytest.mark.usefixtures("empty_cache")
def test_missing_weights_are_reported_with_file_key_and_alternative(backbone, file_name):
    message = refusal(backbone, "openai", image_size=224)
    assert f"get {file_name} from https://" in message
    assert f"MODEL.CLIP_WEIGHTS=/path/to/{file_name}" in message
    assert "the demo (MODEL.BACKBONE tiny) needs no weights" in message


@pytest.mark.usefixtures("empty_cache")
def test_missing_weights_of_a_hub_tag_name_its_page(tags):
    tags["openai"] = {"hf_hub": f"{HUB_PAGE}/", "quick_gelu": True}
    message = refusal(SMALL, "openai")
    assert f"get open_clip_model.safetensors from the hub page {HUB_PAGE}" in message


@pytest.mark.usefixtures("empty_cache")
def test_an_unreachable_network_is_tried_only_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: pytest.fail("this is where the retries are"))
    assert "could not be downloaded" in refusal("RN50", "openai", image_size=224)


def test_a_path_without_a_file_is_refused_with_known_weights(tmp_path):
    message = refusal("RN50", tmp_path / "RN50.pt")
    assert str(tmp_path / "RN50.pt") in message
    assert "neither a file nor a set of weights of RN50 (openai, " in message


# Weights that are there


def test_weights_in_the_hubs_cache_load_without_a_network(tags, small_clip, empty_cache):
    tags["openai"] = {"hf_hub": f"{HUB_PAGE}/", "quick_gelu": True}
    put_into_cache(empty_cache, small_clip)
    assert same_weights(towers(SMALL, "openai"), small_clip)


def test_a_state_dict_file_loads(small_clip, tmp_path):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    assert not is_torchscript(tmp_path / "weights.pt")
    assert same_weights(towers(SMALL, tmp_path / "weights.pt"), small_clip)


def test_an_open_clip_training_checkpoint_loads(small_clip, tmp_path):
    state = {f"module.{key}": value for key, value in small_clip.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    assert same_weights(towers(SMALL, tmp_path / "epoch_3.pt"), small_clip)


def test_a_safetensors_file_loads(small_clip, tmp_path):
    save_file(small_clip.state_dict(), tmp_path / "weights.safetensors")
    assert not is_torchscript(tmp_path / "weights.safetensors")
    assert same_weights(towers(SMALL, tmp_path / "weights.safetensors"), small_clip)


@pytest.fixture
def archive(small_clip, tmp_path) -> Path:
    """Returns a TorchScript archive as OpenAI publishes them: half precision, and three numbers beside the weights."""
    path = tmp_path / "archive.pt"
    small_clip.attn_mask = None  # derived from the context's length, and absent from the published archives
    for name in ("input_resolution", "context_length", "vocab_size"):
        small_clip.__dict__.pop(name, None)
        small_clip.register_buffer(name, torch.tensor(64))
    traced = torch.jit.trace_module(small_clip, {"encode_image": torch.zeros(1, 3, 64, 64)}, check_trace=False)
    torch.jit.save(traced.half(), path)
    return path


@IGNORE_TRACING
def test_a_torchscript_archive_loads_in_full_precision(small_clip, archive):
    assert is_torchscript(archive)
    state = towers(SMALL, archive)._text_tower[0].state_dict()
    expected = small_clip.half().float().state_dict()
    assert expected.keys() - state.keys() == {"input_resolution", "context_length", "vocab_size"}
    for key, value in state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[key]), key


@IGNORE_TRACING
def test_a_torchscript_archive_loads_for_frames_of_another_size(archive):
    model = towers(SMALL, archive, image_size=96)
    assert model(torch.rand(1, 1, 3, 96, 96)).isfinite().all()


def test_a_state_dict_loads_for_frames_of_another_size(small_clip, tmp_path):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    model = towers(SMALL, tmp_path / "weights.pt", image_size=96)
    assert model(torch.rand(1, 1, 3, 96, 96)).isfinite().all()


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights at all", "another model", {}, {"weight": 3}, [1, 2]],
    ids=["empty", "text", "another model", "no entries", "no tensors", "a list"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.usefixtures("tags")
def test_a_wrong_file_is_reported_in_one_sentence(content, suffix, tmp_path):
    path = tmp_path / f"wrong{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(nn.Linear(2, 2).state_dict() if content == "another model" else content, path)
    message = refusal(SMALL, path)
    assert f"MODEL.CLIP_WEIGHTS: {path} does not contain weights of {SMALL}" in message
    assert "set MODEL.BACKBONE" in message
    assert len(message) < 600 + len(str(path))


def test_a_file_of_another_architecture_names_the_mismatch(small_clip, tmp_path, monkeypatch):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, SMALL, {**SMALL_CONFIG, "embed_dim": 48})
    assert "size mismatch" in refusal(SMALL, tmp_path / "weights.pt")


# Properties of the weights: activation and pixels


def activation(model: ClipTowers) -> type:
    return type(model.visual.transformer.resblocks[0].mlp.gelu)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("option", [True, False])
def test_each_tag_has_its_activation(tags, small_clip, tmp_path, quick, option):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    tags["some_tag"] = {"file": str(tmp_path / "weights.pt"), "quick_gelu": quick}
    model = towers(SMALL, "some_tag", QUICK_GELU=option)
    assert activation(model) is (QuickGELU if quick else nn.GELU)
    assert same_weights(model, small_clip)


@pytest.mark.parametrize("backbone", ["RN50", "ViT-B-16"])
def test_openais_weights_are_known_to_need_quick_gelu(backbone):
    assert open_clip.get_pretrained_cfg(backbone, "openai")["quick_gelu"]


@pytest.mark.parametrize("weights", ["random", "file"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_option_chooses_the_activation_for_a_file_and_for_random_weights(small_clip, tmp_path, weights, quick):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    model = towers(SMALL, "random" if weights == "random" else tmp_path / "weights.pt", QUICK_GELU=quick)
    assert activation(model) is (QuickGELU if quick else nn.GELU)


def test_pixels_are_normalised_with_the_values_of_the_tag(tags, small_clip, tmp_path):
    torch.save(small_clip.state_dict(), tmp_path / "weights.pt")
    tags["other"] = {"file": str(tmp_path / "weights.pt"), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    other = towers(SMALL, "other")
    assert (other.pixel_mean, other.pixel_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for model in (towers("tiny"), towers(SMALL), towers(SMALL, tmp_path / "weights.pt")):
        assert tuple(model.pixel_mean) == OPENAI_DATASET_MEAN
        assert tuple(model.pixel_std) == OPENAI_DATASET_STD


# Batch norm


def train_two_steps(model: ClipTowers) -> None:
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(torch.rand(2, 2, 3, 64, 64)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad


def statistics(model: ClipTowers) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in model.named_buffers() if "running" in name or "num_batches" in name}
    assert found
    return found


def test_frozen_batch_norms_keep_their_statistics_while_their_weights_learn():
    model = towers("tiny", FREEZE_BN=True)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before, scale = statistics(model), norm.weight.detach().clone()
    train_two_steps(model)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert not torch.equal(norm.weight, scale)
    assert model.training


def test_unfrozen_batch_norms_update_their_statistics():
    model = towers("tiny", FREEZE_BN=False)
    before = statistics(model)
    train_two_steps(model)
    assert all(not torch.equal(value, before[name]) for name, value in statistics(model).items())


# The text tower


def test_the_text_tower_is_not_in_parameters_or_state():
    model = towers("tiny")
    text = model._text_tower[0]
    of_text = [value for name, value in text.named_parameters() if not name.startswith("visual.")]
    assert of_text
    assert not any(parameter.requires_grad for parameter in of_text)
    assert not {id(parameter) for parameter in of_text} & {id(parameter) for parameter in model.parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} == {"visual"}


def test_training_mode_does_not_reach_the_text_tower():
    model = towers("tiny").train()
    assert not model._text_tower[0].transformer.training


def test_dropping_the_text_tower_keeps_the_image_tower():
    model = towers("tiny").eval()
    text = weakref.ref(model._text_tower[0].transformer)
    before = model(torch.ones(1, 1, 3, 64, 64))
    model.drop_text_tower()
    gc.collect()
    assert text() is None
    assert torch.equal(model(torch.ones(1, 1, 3, 64, 64)), before)
    with pytest.raises(AssertionError, match="text tower"):
        model.class_text(["clap"], "photo")


def test_each_backbone_has_its_own_tokenizer(monkeypatch):
    names: list[str] = []
    monkeypatch.setattr(open_clip, "get_tokenizer", names.append)
    for backbone in ("ViT-B-16-SigLIP", "tiny"):
        _tokenizer.__wrapped__(backbone)
    assert names == ["ViT-B-16-SigLIP", "ViT-B-16"]
