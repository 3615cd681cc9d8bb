"""Running out of memory is one sentence: how much was to be done at once, the peak, and the ways out in order."""

import os
import signal

import pytest
import torch

from episodes.dataset import EpisodeDataset, VideoDataset
from run.cached_features import BackboneEncoder
from run.evaluation import Encoder
from run.main_run import Learner
from run.memory import out_of_memory_told
from run.profiling import write_profile
from tests.conftest import TinyDataset
from tests.test_learner import tiny_config
from utils.errors import UserError

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]


def message(
    data: TinyDataset, tmp_path, monkeypatch: pytest.MonkeyPatch, is_training: bool, error: Exception, *overrides: str
) -> str:
    """What a run says whose backbone runs out of memory in training, or in an evaluation."""
    encode = Encoder.__call__

    def fail(encoder: Encoder, clips: torch.Tensor, chunk: int = 0) -> torch.Tensor:
        if encoder.model.training == is_training:
            raise error
        return encode(encoder, clips, chunk)

    monkeypatch.setattr(Encoder, "__call__", fail)
    learner = Learner(tiny_config(data, tmp_path / "run", *overrides))
    with pytest.raises(UserError) as told:
        learner.train()
    return str(told.value)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu_old", "cpu_new", "python", "cublas", "cuda"])
def test_in_training_it_names_frames_peak_and_the_settings_in_order(tiny_dataset, tmp_path, monkeypatch, error):
    said = message(tiny_dataset, tmp_path, monkeypatch, True, error)
    assert "\n" not in said
    assert "in a training step with 24 frames, 24 of them at once, on cpu, at a peak of " in said
    keys = ("TRAIN.CHUNK=3", "MODEL.ACTIVATION_CHECKPOINTING=true", "USE_AMP=true", "TRAIN.QUERY_PER_CLASS", "SEQ_LEN")
    assert sorted(keys, key=said.index) == list(keys)


def test_settings_that_are_made_already_are_not_named(tiny_dataset, tmp_path, monkeypatch):
    made = ("USE_AMP=true", "MODEL.ACTIVATION_CHECKPOINTING=true", "TRAIN.CHUNK=2", "MODEL.FREEZE_BN=true")
    said = message(tiny_dataset, tmp_path, monkeypatch, True, ERRORS[0], *made)
    assert "24 frames, 8 of them at once" in said
    assert "TRAIN.CHUNK=1" in said
    assert "USE_AMP" not in said
    assert "ACTIVATION" not in said


def test_in_an_evaluation_it_names_the_episodes(tiny_dataset, tmp_path, monkeypatch):
    said = message(tiny_dataset, tmp_path, monkeypatch, False, ERRORS[0])
    assert "in an evaluation with 512 frames or 50 episodes at once" in said
    assert said.index("TEST.BATCH_EPISODES") < said.index("USE_AMP") < said.index("DATA.SEQ_LEN")


def test_before_the_first_step_it_names_the_backbone_and_nothing_is_written(tiny_dataset, tmp_path, monkeypatch):
    def full(model: torch.nn.Module, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    said = r"while the model is built on cpu.* a MODEL\.BACKBONE smaller than tiny"
    with pytest.raises(UserError, match=said) as told:
        Learner(tiny_config(tiny_dataset, tmp_path / "run"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", [EpisodeDataset, VideoDataset])
def test_a_worker_that_the_system_kills_is_one_sentence(tiny_dataset, tmp_path, monkeypatch, dataset):
    own, read = os.getpid(), dataset.__getitem__

    def be_killed(self, item):
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, item)

    monkeypatch.setattr(dataset, "__getitem__", be_killed)
    with pytest.raises(UserError, match=r"a process that reads videos was ended .*lower DATA\.NUM_WORKERS") as told:
        Learner(tiny_config(tiny_dataset, tmp_path / "run", "DATA.NUM_WORKERS=1")).train()
    assert "\n" not in str(told.value)


CACHED = ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")


def test_while_all_training_videos_are_encoded_it_names_their_frames(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(BackboneEncoder, "__call__", out_of_memory)
    with pytest.raises(UserError, match="while encoding all training videos with 512 frames at once on cpu") as told:
        Learner(tiny_config(tiny_dataset, tmp_path / "run", *CACHED)).train()
    assert "TRAIN." not in str(told.value)


def test_with_cached_features_no_setting_of_the_backbone_is_named(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "finish", out_of_memory)
    with pytest.raises(UserError, match="in a training step with the features of 24 frames on cpu") as told:
        Learner(tiny_config(tiny_dataset, tmp_path / "run", *CACHED)).train()
    assert not any(key in str(told.value) for key in ("CHUNK", "ACTIVATION", "USE_AMP"))


def test_a_profile_tells_it_as_a_training_does(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "__call__", out_of_memory)
    with pytest.raises(UserError, match="in a training step with 24 frames"):
        write_profile(Learner(tiny_config(tiny_dataset, tmp_path / "run")), 1)


def out_of_memory(*arguments: object) -> None:
    raise ERRORS[0]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_told("", [], torch.device("cpu")):
        raise RuntimeError("shapes cannot be multiplied")
