"""Weights of other programs: found in a checkpoint, unwrapped, and refused by name if they contain NaN."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from models.backbones import FrameEncoderOptions, ImageNetResNet
from models.clip_fsar import ClipTowers
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.schema import ModelOptions
from utils.weights import STATE_KEYS, not_finite, read_weights, state_dict_of, unwrapped

SMALL = "small-test-clip"
SMALL_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIGLIP_CONFIG = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 192, "heads": 2, "layers": 1, "proj_bias": True,
        "no_causal_mask": True, "pool_type": "last",
    },
}  # fmt: skip
WRAPPINGS: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "both, the other way round": lambda name: f"module._orig_mod.{name}",
    "Lightning's": lambda name: f"model.net.{name}",
    "within": lambda name: name.replace("visual.", "visual._orig_mod.").replace("layer1.", "layer1.module."),
    "the last level": lambda name: f"{name.rpartition('.')[0]}.module.{name.rpartition('.')[2]}".removeprefix("."),
}
every_wrapping = pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Returns a small CLIP with random weights under a name that open_clip knows."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, SMALL, SMALL_CONFIG)
    torch.manual_seed(7)
    return open_clip.create_model(SMALL)


def towers(path: Path, image_size: int = 64) -> ClipTowers:
    return ClipTowers(ModelOptions(BACKBONE=SMALL, CLIP_WEIGHTS=str(path)), image_size)


def resnet(path: Path) -> ImageNetResNet:
    return ImageNetResNet(FrameEncoderOptions(BACKBONE="resnet18", WEIGHTS=str(path)))


def equal(found: nn.Module, expected: dict[str, Tensor]) -> bool:
    state = found.state_dict()
    return all(torch.equal(state[name], value) for name, value in expected.items())


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Wrappers and nesting


@every_wrapping
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_clip_weights_load_from_any_wrapper(clip, tmp_path, wrap, suffix):
    path = tmp_path / f"wrapped{suffix}"
    state = {wrap(name): value for name, value in clip.state_dict().items()}
    torch.save({"state_dict": state}, path) if suffix == ".pt" else save_file(state, path)
    assert equal(towers(path)._text_tower[0], clip.state_dict())


def test_positions_of_wrapped_weights_are_resized_to_the_frames(clip, tmp_path):
    path = tmp_path / "wrapped.pt"
    torch.save({f"_orig_mod.{name}": value.half() for name, value in clip.state_dict().items()}, path)
    assert towers(path, image_size=96).visual.positional_embedding.shape[0] == 1 + 3 * 3


@pytest.mark.parametrize(("wrap", "key"), list(zip(WRAPPINGS.values(), itertools.cycle(STATE_KEYS))), ids=WRAPPINGS)
def test_imagenet_weights_load_from_any_wrapper_and_checkpoint(tmp_path, wrap, key):
    expected = torchvision.models.resnet18().state_dict()
    path = tmp_path / "wrapped.pt"
    torch.save({"epoch": 3, key: {wrap(name): value for name, value in expected.items()}}, path)
    own = {name: value for name, value in expected.items() if not name.startswith("fc.")}
    assert equal(resnet(path).visual, own)


@pytest.mark.parametrize("key", STATE_KEYS)
@every_wrapping
def test_a_released_checkpoint_is_read_from_any_wrapper_and_key(tmp_path, wrap, key):
    path = tmp_path / "released.pt"
    names = {"backbone.visual.layer1.w", "scale"}
    torch.save({key: {wrap(name): torch.ones(2) for name in names}, "iteration": 5}, path)
    content = load_checkpoint(path)
    assert content["iteration"] == 5
    assert content["model_state_dict"].keys() == names


def test_the_same_weight_with_and_without_wrapper_is_refused(clip, tmp_path):
    path = tmp_path / "mixed.pt"
    name = "visual.class_embedding"
    torch.save({**clip.state_dict(), f"module.{name}": torch.zeros(32)}, path)
    assert f"{name} and module.{name}" in refusal(towers, path)
    torch.save({"model_state_dict": {"a.w": torch.zeros(1), "a._orig_mod.w": torch.zeros(1)}}, path)
    assert "a.w and a._orig_mod.w" in refusal(load_checkpoint, path)


def test_wrappers_are_whole_name_components():
    weights = {"modules.w": torch.zeros(1), "my_module.w": torch.zeros(1), "a.module_list.w": torch.zeros(1)}
    assert unwrapped(weights, Path("x.pt")).keys() == weights.keys()


def test_a_newer_checkpoint_format_is_not_a_released_checkpoint(tmp_path):
    path = tmp_path / "later.pt"
    torch.save({"format": 2, "model": {"w": torch.zeros(1)}, "episode": 1}, path)
    assert "format: 1" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_integer_weights_are_refused_by_name(clip, tmp_path, dtype):
    path = tmp_path / "quantised.pt"
    state = {**clip.state_dict(), "text_projection": clip.text_projection.detach().to(dtype)}
    torch.save(state, path)
    assert "text_projection" in refusal(towers, path)
    imagenet = torchvision.models.resnet18().state_dict()
    torch.save({**imagenet, "layer1.0.conv1.weight": imagenet["layer1.0.conv1.weight"].to(dtype)}, path)
    assert "layer1.0.conv1.weight" in refusal(resnet, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_a_file_without_clip_weights_is_refused_in_one_line(clip, tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    refusal(towers, path)  # missing
    path.write_text("hello\n")
    refusal(towers, path)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 1\n")
    assert "LFS" in refusal(towers, path)
    path.unlink()
    path.mkdir()
    refusal(towers, path)


def test_clip_weights_as_numpy_arrays_are_refused_in_one_line(clip, tmp_path):
    path = tmp_path / "big_vision.npz"
    np.savez(path, **{name: value.numpy() for name, value in clip.state_dict().items()})
    refusal(towers, path)


def big_vision_arrays(model: Any) -> dict[str, np.ndarray]:
    """Returns a small SigLIP as big_vision stores it: kernels [in, out], attention [in, heads, width of a head]."""
    arrays: dict[str, Tensor] = {"params/b": model.logit_bias.reshape(1), "params/t": model.logit_scale.reshape(1)}

    def norm(name: str, layer: Any) -> None:
        arrays.update({f"{name}/scale": layer.weight, f"{name}/bias": layer.bias})

    def dense(name: str, layer: Any) -> None:
        arrays.update({f"{name}/kernel": layer.weight.T, f"{name}/bias": layer.bias})

    def attention(name: str, weights: Tensor, biases: Tensor, last: Any, heads: int) -> None:
        for part, weight, bias in zip(("query", "key", "value"), weights.chunk(3), biases.chunk(3), strict=True):
            arrays[f"{name}/{part}/kernel"] = rearrange(weight, "(h d) i -> i h d", h=heads)
            arrays[f"{name}/{part}/bias"] = rearrange(bias, "(h d) -> h d", h=heads)
        arrays[f"{name}/out/kernel"] = rearrange(last.weight, "o (h d) -> h d o", h=heads)
        arrays[f"{name}/out/bias"] = last.bias

    def block(name: str, norms: tuple[Any, Any], layers: tuple[Any, Any], *parts: Any) -> None:
        for number in (0, 1):
            norm(f"{name}/LayerNorm_{number}", norms[number])
            dense(f"{name}/MlpBlock_0/Dense_{number}", layers[number])
        attention(f"{name}/MultiHeadDotProductAttention_0", *parts)

    image, text, top = model.visual.trunk, model.text, "params/img"
    arrays[f"{top}/embedding/kernel"] = rearrange(image.patch_embed.proj.weight, "o i h w -> h w i o")
    arrays |= {f"{top}/embedding/bias": image.patch_embed.proj.bias, f"{top}/pos_embedding": image.pos_embed}
    arrays[f"{top}/cls"] = image.cls_token
    for number, part in enumerate(image.blocks):
        layers, inner = (part.mlp.fc1, part.mlp.fc2), part.attn
        block(f"{top}/Transformer/encoderblock_{number}", (part.norm1, part.norm2), layers,
              inner.qkv.weight, inner.qkv.bias, inner.proj, inner.num_heads)  # fmt: skip
    norm(f"{top}/Transformer/encoder_norm", image.norm)
    pool, head = image.attn_pool, f"{top}/MAPHead_0"
    arrays[f"{head}/probe"] = pool.latent
    norm(f"{head}/LayerNorm_0", pool.norm)
    dense(f"{head}/MlpBlock_0/Dense_0", pool.mlp.fc1)
    dense(f"{head}/MlpBlock_0/Dense_1", pool.mlp.fc2)
    attention(f"{head}/MultiHeadDotProductAttention_0", torch.cat([pool.q.weight, pool.kv.weight]),
              torch.cat([pool.q.bias, pool.kv.bias]), pool.proj, pool.num_heads)  # fmt: skip
    top = "params/txt"
    arrays[f"{top}/Embed_0/embedding"] = text.token_embedding.weight
    arrays[f"{top}/pos_embedding"] = text.positional_embedding[None]
    for number, part in enumerate(text.transformer.resblocks):
        layers, inner = (part.mlp.c_fc, part.mlp.c_proj), part.attn
        block(f"{top}/Encoder_0/encoderblock_{number}", (part.ln_1, part.ln_2), layers,
              inner.in_proj_weight, inner.in_proj_bias, inner.out_proj, inner.num_heads)  # fmt: skip
    norm(f"{top}/Encoder_0/encoder_norm", text.ln_final)
    dense(f"{top}/head", text.text_projection)
    return {name: value.detach().numpy() for name, value in arrays.items()}


def test_big_vision_weights_load_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, SMALL, SIGLIP_CONFIG)
    torch.manual_seed(7)
    source: Any = open_clip.create_model(SMALL)
    arrays, path = big_vision_arrays(source), tmp_path / "big_vision.npz"
    np.savez(path, **arrays)
    assert equal(towers(path, image_size=224)._text_tower[0], source.state_dict())
    assert towers(path, image_size=64).visual.trunk.pos_embed.shape[1] == 1 + 4 * 4
    del arrays["params/img/MAPHead_0/probe"]
    np.savez(path, **arrays)
    assert "MAPHead_0/probe" in refusal(towers, path)


def test_a_backbone_without_its_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr("open_clip.get_tokenizer", lambda name: importlib.import_module("no_such_package"))
    with pytest.raises(UserError, match=r"MODEL\.BACKBONE.*ViT-B-16-SigLIP.*no_such_package"):
        ClipTowers(ModelOptions(BACKBONE="ViT-B-16-SigLIP", CLIP_WEIGHTS="random"), 224)


# Nonfinite values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", " in a checkpoint.pt"])
def test_nonfinite_clip_weights_are_refused_by_name(clip, tmp_path, suffix, value):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state["visual.transformer.resblocks.1.ln_2.bias"][3] = value
    state["text_projection"][0, 0] = value
    path = tmp_path / f"ruined{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "checkpoint" in suffix else state, path)
    message = refusal(towers, path)
    assert "MODEL.CLIP_WEIGHTS" in message
    assert "in 2 of" in message
    assert "text_projection" in message or "visual.transformer.resblocks.1.ln_2.bias" in message
    assert "MODEL.BACKBONE" not in message  # which is not the cause


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_nonfinite_weights_of_a_torchscript_archive_are_refused_by_name(clip, tmp_path):
    path = tmp_path / "archive.pt"
    with torch.no_grad():
        clip.visual.proj[1, 1] = float("nan")
    clip.attn_mask = None  # absent from the published archives
    traced = torch.jit.trace_module(clip, {"encode_image": torch.zeros(1, 3, 64, 64)}, check_trace=False)
    torch.jit.save(traced, path)
    assert "visual.proj" in refusal(towers, path)


def test_nonfinite_imagenet_weights_are_refused_only_if_used(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    path = tmp_path / "ruined.pth"
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, path)
    assert resnet(path).visual is not None
    state["layer3.0.bn1.running_var"][5] = float("inf")
    torch.save(state, path)
    assert "layer3.0.bn1.running_var" in refusal(resnet, path)


def test_a_file_without_a_mapping_of_tensors_is_not_weights(tmp_path):
    path = tmp_path / "odd.pt"
    for content in ([1, 2], {"state_dict": {"w": 3}}, {"w": "text"}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="tensors"):
            read_weights(path)


def test_a_double_too_large_for_float32_is_nonfinite():
    assert not_finite({"w": torch.tensor([1e300], dtype=torch.float64), "v": torch.ones(1)}) == ["w"]


def test_a_file_with_the_weights_of_two_models_is_refused_with_both_keys():
    content = {"state_dict": {"w": torch.zeros(1)}, "model": {"w": torch.ones(1)}, "epoch": 1}
    with pytest.raises(UserError, match=r"state_dict and model"):
        state_dict_of(content, Path("two.pt"))
