"""No file of weights can run anything or exhaust the machine: it is loaded, or refused in one sentence."""

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from models.backbones import _load_weights
from models.clip_fsar import ClipTowers
from models.torchscript import is_torchscript, read_torchscript_weights
from utils.checkpoint import load_checkpoint, load_weights
from utils.errors import UserError
from utils.schema import ModelOptions

OURS = {"format": 1, "model": {"w": torch.zeros(4)}, "episode": 1, "config": None}
NO_TRACING = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*:torch.jit.TracerWarning")


class Payload:
    """Unpickling it would create a file in the current folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.fixture(autouse=True)
def _no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """Returns the error message of a file, one sentence."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "Re-running" not in message  # no advice to disable safe loading
    assert len(message) < 500 + len(str(path))
    return message


def read_clip(path: Path) -> object:
    return ClipTowers(ModelOptions(BACKBONE=SMALL, CLIP_WEIGHTS=str(path)), 64)


def read_resnet(path: Path) -> None:
    _load_weights(nn.Linear(2, 2), "resnet18", path)


SMALL = "small-test-clip"
SMALL_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, SMALL, SMALL_CONFIG)


READERS = {"checkpoint": load_checkpoint, "clip": read_clip, "resnet": read_resnet}
all_readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


# --- code in files ----------------------------------------------------------------------------------------


@all_readers
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        Payload(),
        {**OURS, "note": Payload()},
        {**OURS, "model": {"w": Payload()}},
        {**OURS, "config": {"MODEL": [Payload()]}},
        {"model_state_dict": {"w": torch.zeros(1)}, "acc": Payload()},
        {"state_dict": {"w": Payload()}},
    ],
    ids=["alone", "beside", "as a weight", "in the config", "in the released form", "in a state dict"],
)
def test_a_payload_is_refused_without_running_it(tmp_path: Path, read: Callable, legacy: bool, content: Any) -> None:
    path = tmp_path / "bad.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(read, path)
    if read is load_checkpoint:
        assert "it names posix.mkdir" in message


@all_readers
def test_a_payload_in_the_oldest_format_is_refused_without_running_it(tmp_path: Path, read: Callable) -> None:
    path = tmp_path / "bad.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refusal(read, path)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    """Rewrites a zip file, with every part changed by a function of its name and content."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


class Writer(nn.Module):
    """A TorchScript module that writes a file while it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        torch.save(state[0], "executed")


@NO_TRACING
def test_a_program_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.script(Writer()).save(str(path))
    assert is_torchscript(path)
    torch.jit.load(path)
    assert (tmp_path / "executed").exists(), "PyTorch's own reader does run it"
    (tmp_path / "executed").unlink()
    for read in READERS.values():
        refusal(read, path)
        assert not (tmp_path / "executed").exists()


@NO_TRACING
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_in_a_torchscript_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "bad.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    payload = pickle.dumps({"weight": Payload()}, protocol)
    rewrite(path, lambda name, content: payload if name.endswith("data.pkl") else content)
    refusal(read_clip, path)


# --- TorchScript archives ---------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Nested modules, buffers, a tied weight, a transposed one, a part of a tensor, and other attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.turned = nn.Parameter(torch.randn(4, 5).t())
        self.tied = self.parts[0].weight
        self.register_buffer("end", torch.randn(7)[3:])
        self.register_buffer("number", torch.tensor(64))
        self.register_buffer("none", torch.zeros(0))
        self.heads, self.sizes, self.names = 3, [1, 2], {"a": 1.5}

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x) * self.turned.sum() * self.end.sum() * self.heads * self.sizes[0] * self.names["a"]


@NO_TRACING
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_weights_equal_those_loaded_by_torch(tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    module = Mixed().eval()
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.zeros(1, 2))
    path = tmp_path / "archive.pt"
    made.to(dtype).save(str(path))
    found, expected = read_torchscript_weights(path), torch.jit.load(path).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# --- files that would exhaust the machine -----------------------------------------------------------------


@all_readers
def test_a_decompression_bomb_is_refused_without_reading(tmp_path: Path, read: Callable) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({**OURS, "model": {"w": torch.zeros(5_000_000)}}, path)
    rewrite(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "unpacks to 20,0" in refusal(read, path)


@all_readers
@pytest.mark.parametrize(("legacy", "count"), [(False, 2**42), (False, 2**62), (True, 2**42), (True, 2**62)])
def test_a_tensor_of_terabytes_is_refused(tmp_path: Path, read: Callable, legacy: bool, count: int) -> None:
    path = tmp_path / "huge.pt"
    torch.save({**OURS, "model": {"w": torch.zeros(77)}}, path, _use_new_zipfile_serialization=not legacy)
    small, large = b"KM", b"\x8a\x08" + count.to_bytes(8, "little")
    assert small in path.read_bytes()
    if legacy:
        path.write_bytes(path.read_bytes().replace(small, large))
    else:
        rewrite(path, lambda name, content: content.replace(small, large))
    refusal(read, path)


@NO_TRACING
@pytest.mark.parametrize("count", [2**31 - 1, 78])
def test_a_tensor_that_is_larger_than_its_archive_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "huge.pt"
    torch.jit.script(nn.Linear(77, 1)).save(str(path))
    large = b"J" + count.to_bytes(4, "little")
    rewrite(path, lambda name, content: content.replace(b"KM", large) if name.endswith("data.pkl") else content)
    assert "archive" in refusal(read_clip, path)


class Endless:
    """Pickled, a module that holds itself; or one that doubles with each level."""

    def __reduce__(self) -> tuple:
        return Endless, (), {"a": self, "b": self, "w": 1}


@NO_TRACING
def test_endlessly_nested_modules_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "endless.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    rewrite(path, lambda name, content: pickle.dumps(Endless(), 2) if name.endswith("data.pkl") else content)
    assert "nested too deeply" in refusal(read_clip, path)


@pytest.mark.parametrize("levels", [100, 100_000])
def test_an_endlessly_nested_config_is_refused(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "nested.pt"
    torch.save({**OURS, "config": {"X": "here"}}, path)
    nested = b"]" * levels + b"a" * (levels - 1)
    rewrite(path, lambda name, content: content.replace(b"X\x04\x00\x00\x00here", nested))
    assert "nested.pt" in refusal(load_checkpoint, path)


# --- files that are not checkpoints -----------------------------------------------------------------------


@all_readers
@pytest.mark.parametrize(("kept", "legacy"), [(0, False), (1, False), (0.5, False), (0.999, False), (0.5, True)])
def test_a_truncated_file_is_refused(tmp_path: Path, read: Callable, kept: float, legacy: bool) -> None:
    path = tmp_path / "cut.pt"
    torch.save(OURS, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    refusal(read, path)


def test_a_truncated_or_empty_checkpoint_is_reported_without_internals(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(OURS, path)
    for kept in (path.stat().st_size // 2, 0):
        os.truncate(path, kept)
        assert "cannot be read as a checkpoint (it is empty, cut off or damaged); copy it again" in refusal(
            load_checkpoint, path
        )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_headers_of_terabytes_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"huge{suffix}"
    path.write_bytes((2**62).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')
    refusal(read_clip, path)
    header = b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551615]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refusal(read_clip, path)


def test_folders_pipes_and_devices_do_not_block(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    for name in ("folder.pt", "pipe.pt", "device.pt"):
        assert "no such checkpoint" in refusal(load_checkpoint, tmp_path / name)
        refusal(read_clip, tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "forbidden.pt"
    torch.save(OURS, path)
    path.chmod(0)
    assert "Permission denied" in refusal(load_checkpoint, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"w": torch.zeros(4).to_sparse()}},
        {"model": {"w": torch.zeros(4, device="meta")}},
        {"model": {"w": torch.zeros(4, dtype=torch.complex64)}},
        {"model": {"w": [0.0]}},
        {"model": {3: torch.zeros(4)}},
        {"model": torch.zeros(4)},
        {"episode": True},
        {"episode": 1.5},
        {"config": [1]},
        {"config": {1: 2}},
        {"config": {"MODEL": {"NAME": torch.zeros(1)}}},
        {"best_accuracy": "x"},
        {"best_accuracy": float("nan")},
        {"bad_clips": 1.5},
        {"bad_clips": {1: "x"}},
        {"cached_in": torch.zeros(3)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_an_impossible_training_state_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "odd.pt"
    torch.save({**OURS, **changes}, path)
    refusal(load_checkpoint, path)


def test_one_wrong_byte_in_the_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "copied.pt"
    torch.save({**OURS, "model": {"weight": torch.full((64,), 3.5)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(64, 3.5, np.float32).tobytes()) + 40] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_and_not_loaded(value: float) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    weights = {"weight": torch.full((2, 2), value), "bias": torch.zeros(2)}
    message = refusal(lambda path: load_weights(model, weights, path), Path("x.pt"))
    assert "not finite in 1 of 2 weights, for example in weight" in message
    assert torch.equal(model.weight, before)


def test_integer_weights_are_refused_and_not_loaded() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    weights = {"weight": torch.ones(2, 2, dtype=torch.int32), "bias": torch.zeros(2)}
    message = refusal(lambda path: load_weights(model, weights, path), Path("x.pt"))
    assert "for example weight" in message
    assert torch.equal(model.weight, before)
    load_weights(model, {"weight": torch.ones(2, 2).half(), "bias": torch.zeros(2).bfloat16()}, Path("x.pt"))
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_an_expanded_view_does_not_match(tmp_path: Path) -> None:
    path = tmp_path / "view.pt"
    torch.save({**OURS, "model": {"weight": torch.zeros(1).expand(10**12), "bias": torch.zeros(2)}}, path)
    model = nn.Linear(2, 2)
    assert "another shape" in refusal(lambda path: load_weights(model, load_checkpoint(path)["model"], path), path)
