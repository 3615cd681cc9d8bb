"""Training steps of every method are fast: nothing waits, nothing is encoded or copied twice."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import run.main_run
import run.meter
import run.training_step
from models.base import EpisodeOutput
from run.meter import Meter
from tests.helpers.small_towers import tower
from tests.helpers.tiny_runs import lines_of, trained
from tests.helpers.training_steps import METHODS, step_and_data
from utils import distributed

CPU = torch.device("cpu")
# Operations that copy values of a tensor to Python, or create tensors whose size depends on values: for both, the host
# has to wait for the GPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")


class RefuseToWait(TorchDispatchMode):
    """Fails at operations for which the host waits for the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.lstrip("_").startswith(tuple(word.lstrip("_") for word in WAITING)), f"waits: {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_reads_a_value_from_the_device(method, tiny_dataset, tmp_path):
    step, episodes = step_and_data(method, tiny_dataset, tmp_path, checkpointing=False, chunk=0)
    step.watch.checks_every_step = False  # as on a GPU
    clips = [episodes[0], episodes[1]]
    with RefuseToWait():
        step(range(2), clips)
    with pytest.raises(AssertionError, match="waits"), RefuseToWait():
        step.watch.raise_if_nonfinite()
    step.watch.raise_if_nonfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_gpu(method, tiny_dataset, tmp_path):
    step, episodes = step_and_data(method, tiny_dataset, tmp_path, False, 0, "DEVICE.DEVICE=cuda", "USE_AMP=true")
    pinned = [episodes[i].pin_memory() for i in range(2)]
    step(range(2), pinned)  # the first step chooses kernels and creates the optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(range(2, 4), pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.watch.raise_if_nonfinite()


@pytest.mark.parametrize("method", METHODS)
def test_support_and_queries_share_one_backbone_call_on_uint8_clips(method, tiny_dataset, tmp_path, monkeypatch):
    step, episodes = step_and_data(method, tiny_dataset, tmp_path, checkpointing=False, chunk=0)
    seen = []
    backbone = step.encoder.backbone
    monkeypatch.setattr(step.encoder, "backbone", lambda clips, *rest: seen.append(clips) or backbone(clips, *rest))
    step.add_gradient(episodes[0], group_size=1)
    assert [(clips.dtype, len(clips)) for clips in seen] == [(torch.uint8, 6)]


def test_resnets_use_channels_last_memory():
    for kind in ("RN", "resnet"):
        convolution = tower(kind).visual.layer1[0].conv2
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_optimizer_is_fused(tiny_dataset, tmp_path):
    for method in ("adam", "sgd"):
        overrides = [f"SOLVER.OPTIM_METHOD={method}"]
        step, _ = step_and_data("otam", tiny_dataset, tmp_path, False, 0, *overrides)
        assert step.solver.optimizer.defaults["fused"]


# The share of time spent waiting for data


@pytest.fixture
def clock(monkeypatch):
    """Returns a clock that advances only when a test advances it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run.meter.time, "perf_counter", lambda: clock.now)
    return clock


def train_on(meter: Meter, clock: SimpleNamespace, waits: list[float], step: float) -> None:
    def items():
        for wait in waits:
            clock.now += wait
            yield None

    for _ in meter.timed(items()):
        clock.now += step
        meter.add(EpisodeOutput(torch.eye(2)[None], {"loss": torch.ones(())}), torch.arange(2)[None])


def test_data_wait_percent_is_waiting_time_over_total_time(clock):
    meter = Meter(CPU)
    train_on(meter, clock, waits=[3.0, 1.0], step=8.0)
    values = meter.take()
    assert values["data_wait_percent"] == pytest.approx(100 * 4 / 20)
    assert values["episodes_per_second"] == pytest.approx(2 / 20)
    train_on(meter, clock, waits=[0.0], step=5.0)
    assert meter.take()["data_wait_percent"] == 0


def test_validation_and_saving_time_is_not_counted(clock):
    meter = Meter(CPU)
    train_on(meter, clock, waits=[1.0], step=1.0)
    with meter.pause():
        clock.now += 1000
    train_on(meter, clock, waits=[1.0], step=1.0)
    values = meter.take()
    assert values["data_wait_percent"] == pytest.approx(50)
    assert values["episodes_per_second"] == pytest.approx(2 / 4)


def train_in_processes(meters: list[Meter], clock: SimpleNamespace) -> list[dict[str, float]]:
    """Returns states of parallel processes: ten seconds, one episode each, and six and two seconds of waiting."""
    parts = []
    for meter, wait in zip(meters, (6.0, 2.0), strict=True):
        begun = clock.now
        train_on(meter, clock, waits=[wait], step=10.0 - wait)
        parts += meter.state()
        clock.now = begun
    return parts


def test_resuming_with_fewer_processes_does_not_add_training_time(clock):
    meter = Meter(CPU)
    meter.restore(train_in_processes([Meter(CPU), Meter(CPU)], clock))
    values = meter.take()
    assert values["episodes_per_second"] == pytest.approx(2 / 10)
    assert values["data_wait_percent"] == pytest.approx(40)


def test_resuming_with_more_processes_does_not_reduce_waiting_time(clock, monkeypatch):
    state = train_in_processes([Meter(CPU), Meter(CPU)], clock)
    meters = [Meter(CPU) for _ in range(4)]
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, meter in enumerate(meters):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        meter.restore(state)
    own = [
        {"episodes": m.episodes, "wait": m._local_wait(), **{k: v.item() for k, v in m.sums.items()}} for m in meters
    ]
    monkeypatch.setattr(distributed, "gather", lambda value: own)
    values = meters[3].take()
    assert values["loss"] == pytest.approx(1)
    assert values["episodes_per_second"] == pytest.approx(2 / 10)
    assert values["data_wait_percent"] == pytest.approx(40)


def test_encoding_before_the_first_step_is_not_training_time(tiny_dataset, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run.meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    encode = run.main_run.CachedEpisodes

    def slow(*arguments: object) -> run.main_run.CachedEpisodes:
        clock.now += 1000
        return encode(*arguments)

    monkeypatch.setattr(run.main_run, "CachedEpisodes", slow)
    forward = run.training_step.TrainingStep.forward

    def one_second(step, episode):
        clock.now += 1
        return forward(step, episode)

    monkeypatch.setattr(run.training_step.TrainingStep, "forward", one_second)
    trained(tiny_dataset, tmp_path / "run", "MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")
    rates = [line["train/episodes_per_second"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert rates == pytest.approx([1] * len(rates))
