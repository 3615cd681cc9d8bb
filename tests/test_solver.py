"""Learning rate, optimizers and clipping do what the config says."""

import math

import pytest
import torch
from torch import nn

from run.solver import Solver, build_optimizer, rate_factor
from utils.schema import SolverOptions


def test_without_a_schedule_the_rate_stays():
    assert [rate_factor(SolverOptions(), done, 100) for done in (1, 50, 100)] == [1, 1, 1]


def test_a_milestone_divides_the_rate_by_ten_for_the_episodes_after_it():
    options = SolverOptions(LR_SCH=[10, 20])
    assert [rate_factor(options, done, 30) for done in (10, 11, 20, 21)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert rate_factor(SolverOptions(LR_SCH=1000000), 20010, 20010) == 1  # the published files' never


def test_cosine_falls_to_zero_at_the_last_episode():
    options = SolverOptions(LR_SCH="cosine")
    assert rate_factor(options, 50, 100) == pytest.approx(0.5)
    assert rate_factor(options, 25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate_factor(options, 100, 100) == pytest.approx(0)


def test_warm_up_rises_linearly():
    options = SolverOptions(WARMUP_EPISODES=10)
    assert [rate_factor(options, done, 100) for done in (1, 5, 10, 11)] == pytest.approx([0.1, 0.5, 1, 1])


@pytest.mark.parametrize("schedule", ["cosine", [30]])
def test_warm_up_multiplies_any_schedule(schedule):
    warm, plain = SolverOptions(LR_SCH=schedule, WARMUP_EPISODES=50), SolverOptions(LR_SCH=schedule)
    for done in (10, 40, 50, 90):
        assert rate_factor(warm, done, 100) == pytest.approx(min(1, done / 50) * rate_factor(plain, done, 100))


def test_the_optimizer_takes_the_scheduled_rate():
    model = nn.Linear(1, 1, bias=False)
    options = SolverOptions(OPTIM_METHOD="sgd", LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0, WARMUP_EPISODES=10)
    solver, before = Solver(model, options, total_episodes=100), model.weight.item()
    model.weight.grad = torch.full((1, 1), 3.0)
    solver.step(5, solver.gradient_norm(), skip=torch.zeros(()))
    assert model.weight.item() == pytest.approx(before - 0.5 * 3.0)
    assert solver.learning_rate == 0.5


def test_optimizers_have_the_configured_numbers():
    parameters = [nn.Parameter(torch.zeros(1))]
    adam = build_optimizer(parameters, SolverOptions(LR=1e-3, WEIGHT_DECAY=0.1))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["betas"] == (0.5, 0.999)  # as published
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (1e-3, 0.1)
    other = build_optimizer(parameters, SolverOptions(BETAS=[0.8, 0.9]))
    assert other.defaults["betas"] == (0.8, 0.9)
    sgd = build_optimizer(parameters, SolverOptions(OPTIM_METHOD="sgd", MOMENTUM=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.8


def test_gradients_are_clipped_to_the_given_norm_and_cleared_after_the_step():
    model = nn.Linear(4, 1, bias=False)
    options = SolverOptions(OPTIM_METHOD="sgd", LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    solver = Solver(model, options, total_episodes=10, clip_grad=0.5)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((1, 4), 10.0)
    solver.step(1, solver.gradient_norm(), skip=torch.zeros(()))
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert model.weight.grad is None


def test_frozen_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert len(Solver(model, SolverOptions(), 10).parameters) == 2
