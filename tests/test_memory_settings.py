"""TRAIN.CHUNK and MODEL.ACTIVATION_CHECKPOINTING need less memory and change no gradient."""

import functools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import CountedMemory, drop_values, peak_of_step, without_values
from benchmarks.training import peak_bytes, training_step
from episodes.dataset import EpisodeDataset
from models.frame_tower import FrameTower
from run.main_run import Learner
from run.training_step import TrainingStep
from tests.helpers.distributed_jobs import train_until
from tests.helpers.small_towers import KINDS, frames, tower
from tests.helpers.tiny_runs import lines_of, tiny_config, trained
from tests.helpers.training_steps import FROZEN, METHODS, step_and_data
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError

CPU = torch.device("cpu")
CHECKPOINTING = "MODEL.ACTIVATION_CHECKPOINTING=true"


def gradients(step: TrainingStep, episodes: EpisodeDataset) -> dict[str, Tensor]:
    for episode in episodes:
        step.add_gradient(episode, group_size=2)
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_keeps_gradients(method, tiny_dataset, tmp_path):
    settings = [(False, 0), (False, 1), (True, 0), (True, 4)]
    found = {setting: gradients(*step_and_data(method, tiny_dataset, tmp_path, *setting)) for setting in settings}
    plain = found[False, 0]
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "convolutions" in name)
    for setting, others in found.items():
        assert others.keys() == plain.keys()
        for name, gradient in plain.items():
            # Below 1e-4, for example where terms cancel, only rounding remains; its size depends on the processor.
            size = gradient.abs().max().clamp_min(1e-4)
            difference = (others[name] - gradient).abs().max() / size
            assert difference < 1e-3, f"{setting} {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_features_gradients_and_names(kind):
    found = {}
    for checkpointing in (False, True):
        model = tower(kind, ACTIVATION_CHECKPOINTING=checkpointing)
        features = model(frames())
        features.square().sum().backward()
        found[checkpointing] = (features.detach(), {name: p.grad for name, p in model.named_parameters()})
        assert list(model.state_dict()) == list(tower(kind).state_dict())
    torch.testing.assert_close(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-5)


def run(model: FrameTower) -> None:
    model(frames(64)).sum().backward()


@pytest.mark.parametrize("kind", ["ViT", "RN", "resnet"])  # of the tiny one, all convolutions are one unit
def test_checkpointing_reduces_memory(kind):
    plain, less = (
        peak_bytes(functools.partial(run, tower(kind, ACTIVATION_CHECKPOINTING=on)), CPU) for on in (False, True)
    )
    assert less < plain


def test_smaller_chunks_reduce_memory(tiny_dataset, tmp_path):
    found = []
    for chunk in (0, 2):
        step, episodes = step_and_data("otam", tiny_dataset, tmp_path, False, chunk)
        found.append(peak_bytes(functools.partial(step.add_gradient, episodes[0], 1), CPU))
    plain, chunked = found
    assert chunked < 0.75 * plain  # 2 of 6 videos, and the head


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["ViT", "RN"])
def test_estimated_memory_equals_measured_memory(kind, checkpointing):
    model, fake = tower(kind, ACTIVATION_CHECKPOINTING=checkpointing), FakeTensorMode()
    measured = peak_bytes(functools.partial(run, model), CPU)
    drop_values(model, fake)
    with fake, CountedMemory() as counted:
        counted.hold([*model.parameters(), *model.buffers()])
        weights = counted.now
        model(torch.empty(frames(64).shape)).sum().backward()
    assert counted.peak - weights == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("overrides", [(), ("TRAIN.CHUNK=2",), ("MODEL.TRAINABLE=head",)])
def test_estimated_memory_of_a_step_is_close_to_measured(overrides, tiny_dataset, tmp_path):
    larger = ("DATA.IMG_SIZE=128", "DATA.SHORT_SIDE=128", "DATA.SEQ_LEN=8")
    learner = Learner(tiny_config(tiny_dataset, tmp_path, FROZEN, *larger, *overrides))
    episode = EpisodeDataset(learner.data.samplers["train"], learner.data.clip_options, range(1))[0]
    step = training_step(learner)
    measured = peak_bytes(functools.partial(step.add_gradient, episode, 1), CPU)
    fake = without_values(learner)
    weights, counted = peak_of_step(learner, fake)
    assert 0.7 * measured < counted <= measured  # convolutions on a CPU take more memory for a moment
    assert peak_of_step(learner, fake) == (weights, counted)


def test_a_chunked_run_equals_the_plain_run(tiny_dataset, tmp_path):
    overrides = (FROZEN, "SOLVER.OPTIM_METHOD=sgd", "SOLVER.LR=0.01", "MODEL.SPM.GENERATOR_DROPOUT=0.3")
    plain = trained(tiny_dataset, tmp_path / "plain", *overrides)
    chunked = trained(tiny_dataset, tmp_path / "chunked", *overrides, "TRAIN.CHUNK=4", CHECKPOINTING)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(chunked.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    losses = [[line["train/loss"] for line in lines_of(tmp_path / run) if "train/loss" in line]
              for run in ("plain", "chunked")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_resumes_with_other_memory_settings(tiny_dataset, tmp_path):
    train_until(Learner(tiny_config(tiny_dataset, tmp_path / "run", FROZEN, "CHECKPOINT.SAVE_FREQ=2")), 2)
    trained(tiny_dataset, tmp_path / "run", FROZEN, "TRAIN.CHUNK=4", CHECKPOINTING,
            "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")  # fmt: skip
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 6


@pytest.mark.parametrize("setting", ["TRAIN.CHUNK=4", CHECKPOINTING])
def test_trainable_batch_norms_are_refused_with_both_keys(setting, tiny_dataset, tmp_path):
    with pytest.raises(UserError) as refused:
        tiny_config(tiny_dataset, tmp_path, "MODEL.FREEZE_BN=false", setting)
    assert setting.partition("=")[0] in str(refused.value)
    assert "MODEL.FREEZE_BN" in str(refused.value)
    tiny_config(tiny_dataset, tmp_path, "MODEL.FREEZE_BN=false", setting, "MODEL.TRAINABLE=head")


def test_a_tower_with_unknown_blocks_cannot_be_checkpointed():
    with pytest.raises(UserError, match=r"MODEL\.ACTIVATION_CHECKPOINTING is true, but the blocks of other"):
        tower("other", ACTIVATION_CHECKPOINTING=True)
