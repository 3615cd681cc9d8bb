"""A step hands each method the right parts of an episode, and the watch and the optimizer the mean of the group."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName
from run.cached_episodes import EpisodeFeatures
from run.encoder import Encoder
from run.meter import Meter
from run.solver import Solver
from run.training_step import TrainingStep
from tests.helpers.methods import PROTOCOLS, build
from tests.helpers.tiny_runs import DEMO
from utils.config import load_config

CPU = torch.device("cpu")
WAYS, SHOTS, QUERIES, FRAMES, CLASSES, WIDTH = 3, 2, 3, 4, 6, 128


def step_of(*overrides: str) -> TrainingStep:
    sizes = (f"TRAIN.WAY={WAYS}", f"TRAIN.SHOT={SHOTS}", f"TRAIN.QUERY_PER_CLASS={QUERIES // WAYS}")
    config = load_config(DEMO, [*sizes, *overrides]).config
    model = build("clipspm").train()
    text = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    encoder = Encoder(model, CPU, normalise_pixels=True, amp=False)
    return TrainingStep(model, encoder, Solver(model, config.SOLVER, 100), Meter(CPU), text, config)


def episode_of(index: int) -> EpisodeFeatures:
    features = torch.randn(WAYS * SHOTS + QUERIES, FRAMES, WIDTH, generator=torch.Generator().manual_seed(index))
    return EpisodeFeatures(index, features, torch.tensor([4, 0, 5]), torch.tensor([2, 0, 1]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_method_receives_all_parts_of_an_episode(monkeypatch, protocol):
    step, episode = step_of(f"TRAIN.PROTOCOL={protocol}"), episode_of(0)
    seen: list[Any] = []

    def note(parts: Episode, labels: EpisodeLabels, used: ProtocolName) -> EpisodeOutput:
        seen.extend((parts, labels, used))
        return EpisodeOutput(torch.zeros(1, QUERIES, WAYS), {})

    monkeypatch.setattr(step.model, "training_losses", note)
    step.forward(episode)
    parts, labels, used = seen
    assert used == protocol
    for way, class_id in enumerate(episode.class_ids):
        assert torch.equal(parts.class_text[0, way], step.class_text[class_id])
        for shot in range(SHOTS):
            assert torch.equal(parts.support[0, way, shot], episode.features[way * SHOTS + shot])
    assert torch.equal(parts.query[0], episode.features[WAYS * SHOTS :])
    assert labels.query.tolist() == [[2, 0, 1]]
    assert labels.class_ids.tolist() == [[4, 0, 5]]
    assert torch.equal(labels.all_text, step.class_text)


def test_dropout_depends_only_on_seed_and_episode(monkeypatch):
    def drawn(seed: int, index: int) -> Tensor:
        step, numbers = step_of(f"MODEL.SEED={seed}"), []
        forward = step.forward
        monkeypatch.setattr(step, "forward", lambda episode: numbers.append(torch.rand(3)) or forward(episode))
        step.add_gradient(episode_of(index), 1)
        return numbers[0]

    expected = drawn(1, 1)
    torch.rand(5)
    assert torch.equal(drawn(1, 1), expected)
    others = [drawn(seed, index) for seed, index in ((1, 0), (1, 2), (2, 1), (2, 0), (0, 2))]
    assert not any(torch.equal(other, expected) for other in others)


def test_the_watch_sees_the_mean_loss_and_the_norm_of_the_mean_gradient(monkeypatch):
    step, group = step_of("SOLVER.WARMUP_EPISODES=50", "SOLVER.LR_SCH=none", "SOLVER.LR=0.5"), range(6, 9)
    totals = [step.add_gradient(episode_of(index), 1)[0].total.item() for index in group]
    squares = [parameter.grad.square().sum() for parameter in step.solver.parameters if parameter.grad is not None]
    step.solver.optimizer.zero_grad()
    seen: list[Any] = []
    monkeypatch.setattr(step.watch, "record", lambda *arguments: seen.extend(arguments))
    step(group, map(episode_of, group))
    seen_group, loss, norm = seen
    assert seen_group == group
    assert loss.item() == pytest.approx(sum(totals) / 3, rel=1e-5)
    assert norm.item() == pytest.approx(sum(squares).sqrt().item() / 3, rel=1e-4)
    assert step.solver.learning_rate == pytest.approx(0.5 * 9 / 50)  # episodes seen, those of this step included
    assert step.meter.take()["loss"] == pytest.approx(sum(totals) / 3, rel=1e-5)
