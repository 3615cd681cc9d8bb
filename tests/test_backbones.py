"""The ImageNet backbones: widths, sources of weights, one sentence for missing files, and batch norm."""

import hashlib
import socket
import time
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer

import models.backbones
from models.backbones import RESNETS, FrameEncoderOptions, ImageNetResNet, frame_encoder
from models.clip_fsar import ClipTowers
from utils.errors import UserError

NAMES_AND_WIDTHS = [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]


def encoder(backbone: str = "resnet18", weights: str | Path = "random", image_size: int = 64, **options):
    return frame_encoder(FrameEncoderOptions(BACKBONE=backbone, WEIGHTS=str(weights), **options), image_size)


def refusal(*arguments, **options) -> str:
    """Returns the error message of an encoder, one sentence."""
    with pytest.raises(UserError) as refused:
        encoder(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Returns a complete resnet18 of torchvision with random "trained" weights and classifier."""
    torch.manual_seed(7)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Returns an empty torchvision cache; no test may use the one of this machine."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch, tmp_path) -> Path:
    """Returns a folder that replaces the download server of all weights."""
    folder = tmp_path / "server"
    folder.mkdir()
    known = torchvision.models.get_model_weights

    def moved(backbone: str) -> dict:
        name = known(backbone)["IMAGENET1K_V1"].url.rpartition("/")[2]
        found = next(folder.glob(f"{backbone}-*"), folder / name)
        return {"IMAGENET1K_V1": type("Weights", (), {"url": found.as_uri()})}

    monkeypatch.setattr(torchvision.models, "get_model_weights", moved)
    return folder


def same_weights(found: ImageNetResNet, expected: nn.Module) -> bool:
    state = found.visual.state_dict()
    wanted = {key: value for key, value in expected.state_dict().items() if not key.startswith("fc.")}
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


# Networks


def test_every_resnet_has_a_test_case():
    assert [name for name, _ in NAMES_AND_WIDTHS] == list(RESNETS)


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "width"), NAMES_AND_WIDTHS)
def test_every_resnet_encodes_frames_to_its_width(backbone, width):
    model = encoder(backbone).eval()
    features = model(torch.rand(2, 3, 3, 64, 64))
    assert features.shape == (2, 3, width)
    assert model.width == width
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_features_equal_torchvisions_pooled_features(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    model = encoder(weights=tmp_path / "trained.pth").eval()
    frames = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = trained(frames[1, 2:]).squeeze()
    torch.testing.assert_close(trained.fc(model(frames)[1, 2]), expected, rtol=1e-4, atol=1e-4)


def test_pixels_are_normalised_as_by_torchvision():
    presets = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    model = encoder()
    assert (list(model.pixel_mean), list(model.pixel_std)) == (presets.mean, presets.std)


def test_a_clip_backbone_has_no_text_tower():
    model = encoder("tiny", CLIP_WEIGHTS="random")
    assert isinstance(model, ClipTowers)
    assert model._text_tower == []
    assert model(torch.rand(1, 2, 3, 64, 64)).shape == (1, 2, model.width)


@pytest.mark.parametrize("wrong", ["resnet101", "ResNet50"])
def test_an_unknown_resnet_is_refused_with_the_known_ones(wrong):
    message = refusal(wrong)
    assert message.startswith(f"MODEL.BACKBONE: {wrong!r} is not one of the ImageNet backbones resnet18, resnet34, res")


def test_an_unknown_backbone_is_refused_as_by_the_clip_base_model():
    assert refusal("RN5O").startswith("MODEL.BACKBONE: 'RN5O' is neither tiny, tiny-vit nor a model of")


# Weights


@pytest.mark.parametrize("classifier", [True, False])
def test_weights_load_from_a_file_with_or_without_classifier(trained, tmp_path, classifier):
    state = {key: value for key, value in trained.state_dict().items() if classifier or not key.startswith("fc.")}
    torch.save(state, tmp_path / "mine.pth")
    assert same_weights(encoder(weights=tmp_path / "mine.pth"), trained)


def test_imagenets_weights_in_the_cache_load_without_a_network(trained, cache, monkeypatch):
    cache.mkdir(parents=True)
    torch.save(trained.state_dict(), cache / "resnet18-f37072fd.pth")
    monkeypatch.setattr(models.backbones, "_download", lambda *_: pytest.fail("the file is there"))
    assert same_weights(encoder(weights="imagenet"), trained)


def test_imagenets_weights_are_downloaded_once_into_the_cache(trained, cache, server, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "new.pth")
    digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()
    source = server / f"resnet18-{digest[:8]}.pth"
    (tmp_path / "new.pth").rename(source)
    assert same_weights(encoder(weights="imagenet"), trained)
    assert [path.name for path in cache.iterdir()] == [source.name]
    content = (cache / source.name).read_bytes()
    assert content == source.read_bytes()


def test_a_download_with_another_hash_is_refused_and_not_kept(trained, cache, server):
    torch.save(trained.state_dict(), server / "resnet18-00000000.pth")
    message = refusal(weights="imagenet")
    assert "could not be downloaded" in message
    assert "hash" in message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("resnet18", "resnet18-f37072fd.pth"),
        ("resnet34", "resnet34-b627a593.pth"),
        ("resnet50", "resnet50-0676ba61.pth"),
    ],
)
def test_missing_weights_are_reported_with_file_location_and_alternative(backbone, name, cache, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(models.backbones.urllib.request, "urlopen", no_network)
    message = refusal(backbone, "imagenet")
    assert f"get {name} from https://download.pytorch.org/models/{name}" in message
    assert str(cache) in message
    assert f"MODEL.WEIGHTS=/path/to/{name}" in message
    assert "Network is unreachable" in message
    assert message.endswith("MODEL.WEIGHTS=random needs no file")
    assert not cache.exists()


def test_a_download_stops_at_the_time_limit(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-f37072fd.pth"
        weights = {"IMAGENET1K_V1": type("Weights", (), {"url": url})}
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: weights)
        monkeypatch.setattr(models.backbones, "SERVER_TIMEOUT", 0.2)
        before = time.monotonic()
        message = refusal(weights="imagenet")
    assert time.monotonic() - before < 5
    assert "could not be downloaded" in message
    assert "timed out" in message


def test_a_path_without_a_file_is_refused(tmp_path):
    message = refusal(weights=tmp_path / "nothing.pth")
    assert message.startswith(f"MODEL.WEIGHTS: '{tmp_path / 'nothing.pth'}' is neither imagenet nor random nor a file")


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"<html>404</html>"])
def test_a_wrong_file_is_reported_in_one_sentence(content, tmp_path):
    path = tmp_path / "wrong.pth"
    path.write_bytes(content)
    message = refusal(weights=path)
    assert message.startswith(f"MODEL.WEIGHTS: {path} does not contain torchvision's state dict of resnet18 (")


@pytest.mark.parametrize("saved", [[1, 2], torch.zeros(3), {"unknown": torch.zeros(1)}, {"conv1.weight": None}])
def test_a_file_of_other_contents_is_reported_in_one_sentence(saved, tmp_path):
    torch.save(saved, tmp_path / "else.pth")
    assert "does not contain torchvision's state dict of resnet18" in refusal(weights=tmp_path / "else.pth")


def test_a_file_of_another_architecture_is_reported_with_the_key_to_change(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    message = refusal("resnet50", tmp_path / "trained.pth")
    assert "does not contain torchvision's state dict of resnet50" in message
    assert "set MODEL.BACKBONE to the model" in message


def test_a_file_with_code_is_refused_without_running_it(tmp_path):
    class Danger:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv1.weight": Danger()}, tmp_path / "danger.pth")
    assert "does not contain" in refusal(weights=tmp_path / "danger.pth")
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
def test_weights_of_a_sequential_load_under_torchvisions_names(trained, tmp_path):
    layers = list(trained.children())
    for count in (len(layers) - 2, len(layers)):  # up to the maps, as in the released methods, and complete
        torch.save(nn.Sequential(*layers[:count]).state_dict(), tmp_path / "sequential.pth")
        assert same_weights(encoder(weights=tmp_path / "sequential.pth"), trained)


# Stride


@torch.no_grad()
def test_the_stride_moves_to_the_first_1x1_convolution_of_each_block():
    torch.manual_seed(0)
    usual = encoder("resnet50").eval()
    torch.manual_seed(0)
    moved = encoder("resnet50", STRIDE_IN_1X1=True).eval()
    assert usual.visual.state_dict().keys() == moved.visual.state_dict().keys()
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        first, *others = getattr(moved.visual, stage)
        assert (first.conv1.stride, first.conv2.stride) == ((stride, stride), (1, 1))
        assert all(block.conv1.stride == block.conv2.stride == (1, 1) for block in others)
    # Where the 1x1 convolution keeps every second position, the block sees only those.
    block, maps = moved.visual.layer2[0], torch.rand(1, 256, 8, 8)
    kept = maps.clone()
    kept[..., 1::2, :] = kept[..., 1::2] = 0
    torch.testing.assert_close(block(kept), block(maps))
    assert not torch.allclose(usual.visual.layer2[0](kept), usual.visual.layer2[0](maps))
    assert moved(torch.rand(1, 2, 3, 64, 64)).shape == (1, 2, 2048)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_b_16", "tiny"])
def test_a_stride_in_other_backbones_is_refused(backbone):
    message = refusal(backbone, STRIDE_IN_1X1=True, CLIP_WEIGHTS="random")
    assert "MODEL.STRIDE_IN_1X1" in message
    assert backbone in message


# ViT


@pytest.fixture
def small_vit(monkeypatch) -> None:
    """Returns torchvision's vit_b_16 with two narrow layers."""

    def get_model(name: str, weights: None, image_size: int = 224) -> nn.Module:
        assert name == "vit_b_16"
        return VisionTransformer(image_size, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


@torch.no_grad()
def test_a_vit_encodes_frames_as_torchvision_does(small_vit, tmp_path):
    torch.manual_seed(7)
    whole = torchvision.models.get_model("vit_b_16", None, 64).eval()
    nn.init.normal_(whole.heads.head.weight)
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    model = encoder("vit_b_16", tmp_path / "vit.pth").eval()
    frames = torch.rand(2, 3, 3, 64, 64)
    features = model(frames)
    assert features.shape == (2, 3, model.width) == (2, 3, 8)
    torch.testing.assert_close(whole.heads(features[1]), whole(frames[1]))
    assert model.drop_pooling() == 8
    maps = model.feature_maps(frames)
    assert maps.shape == (2, 3, 4, 4, 8)
    tokens = torch.cat([whole.class_token.expand(3, -1, -1), whole.conv_proj(frames[1]).flatten(2).mT], dim=1)
    torch.testing.assert_close(maps[1].flatten(1, 2), whole.encoder(tokens)[:, 1:])


def test_a_vits_positions_are_interpolated_to_frames_of_another_size(small_vit, tmp_path):
    torch.save(torchvision.models.get_model("vit_b_16", None, 64).state_dict(), tmp_path / "vit.pth")
    model = encoder("vit_b_16", tmp_path / "vit.pth", image_size=96)
    assert model.visual.encoder.pos_embedding.shape == (1, 1 + 6 * 6, 8)
    assert model(torch.rand(1, 2, 3, 96, 96)).shape == (1, 2, 8)


def test_frames_not_divisible_into_patches_are_refused(small_vit):
    message = refusal("vit_b_16", image_size=72)
    assert "DATA.IMG_SIZE is 72" in message
    assert "multiple of 16" in message


def test_training_the_last_vit_blocks_works_with_recomputing(small_vit):
    frames = torch.rand(1, 2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = encoder("vit_b_16", image_size=32, TRAINABLE="last_1", ACTIVATION_CHECKPOINTING=recompute).train()
        model(frames).square().sum().backward()
        trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert {name.split(".")[2] for name in trained} == {"layers", "ln"}
        assert not any("encoder_layer_0" in name for name in trained)
        gradients.append(trained)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_vit_of_a_config_is_torchvisions():
    with torch.device("meta"):
        model = encoder("vit_b_16", image_size=224)
    assert model.width == 768
    assert len(model.visual.encoder.layers) == 12


# Batch norm


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norms_keep_their_statistics_while_their_weights_learn(frozen):
    model = encoder(FREEZE_BN=frozen).train()
    before = model.visual.bn1.running_mean.clone()
    model(torch.rand(1, 2, 3, 64, 64)).sum().backward()
    assert torch.equal(model.visual.bn1.running_mean, before) == frozen
    assert model.visual.bn1.weight.grad is not None
    modes = {module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert modes == {not frozen}
    assert model.visual.conv1.training
