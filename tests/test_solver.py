"""Learning rate, optimizers and clipping do what the config says."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from models.base import FewShotModel, ParameterGroup
from run.solver import Solver, build_optimizer, rate_factor
from utils.errors import UserError
from utils.schema import Config, SolverOptions


def test_without_a_schedule_the_rate_is_constant():
    assert [rate_factor(SolverOptions(), done, 100) for done in (1, 50, 100)] == [1, 1, 1]


def test_a_milestone_divides_the_rate_by_ten():
    options = SolverOptions(LR_SCH=[10, 20])
    assert [rate_factor(options, done, 30) for done in (10, 11, 20, 21)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert rate_factor(SolverOptions(LR_SCH=1000000), 20010, 20010) == 1  # the published files' never


def test_a_milestone_may_set_its_factor():
    options = SolverOptions(LR_SCH=[10, 20], LR_FACTORS=[0.5, 0.05])
    assert [rate_factor(options, done, 30) for done in (10, 11, 20, 21)] == [1, 0.5, 0.5, 0.05]


@pytest.mark.parametrize(
    ("schedule", "factors"), [("none", [0.5]), ("cosine", [0.5]), (10, [0.5, 0.1]), ([9, 5], [0.5, 0.1]), (10, [])]
)
def test_factors_that_do_not_match_the_milestones_are_refused(schedule, factors):
    with pytest.raises(ValueError, match=r"SOLVER\.LR_FACTORS.*SOLVER\.LR_SCH"):
        Config(SOLVER=SolverOptions(LR_SCH=schedule, LR_FACTORS=factors))


def test_cosine_falls_to_zero_at_the_last_episode():
    options = SolverOptions(LR_SCH="cosine")
    assert rate_factor(options, 50, 100) == pytest.approx(0.5)
    assert rate_factor(options, 25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate_factor(options, 100, 100) == pytest.approx(0)


def test_warm_up_rises_linearly():
    options = SolverOptions(WARMUP_EPISODES=10)
    assert [rate_factor(options, done, 100) for done in (1, 5, 10, 11)] == pytest.approx([0.1, 0.5, 1, 1])


def test_warm_up_may_start_above_zero():
    options = SolverOptions(WARMUP_EPISODES=10, WARMUP_FACTOR=0.2)
    assert [rate_factor(options, done, 100) for done in (5, 10, 11)] == pytest.approx([0.6, 1, 1])


@pytest.mark.parametrize("schedule", [{"LR_SCH": "cosine"}, {"LR_SCH": [30]}, {"LR_SCH": [30], "LR_FACTORS": [0.4]}])
def test_warm_up_multiplies_any_schedule(schedule):
    warm, plain = SolverOptions(**schedule, WARMUP_EPISODES=50), SolverOptions(**schedule)
    for done in (10, 40, 50, 90):
        assert rate_factor(warm, done, 100) == pytest.approx(min(1, done / 50) * rate_factor(plain, done, 100))


def test_the_optimizer_uses_the_scheduled_rate():
    model = nn.Linear(1, 1, bias=False)
    options = SolverOptions(OPTIM_METHOD="sgd", LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0, WARMUP_EPISODES=10)
    solver, before = Solver(model, options, total_episodes=100), model.weight.item()
    model.weight.grad = torch.full((1, 1), 3.0)
    solver.step(5, solver.gradient_norm(), skip=torch.zeros(()))
    assert model.weight.item() == pytest.approx(before - 0.5 * 3.0)
    assert solver.learning_rate == 0.5


def test_optimizers_use_the_configured_values():
    parameters = [ParameterGroup("all", [nn.Parameter(torch.zeros(1))])]
    adam = build_optimizer(parameters, SolverOptions(LR=1e-3, WEIGHT_DECAY=0.1))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["betas"] == (0.5, 0.999)  # as published
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (1e-3, 0.1)
    other = build_optimizer(parameters, SolverOptions(BETAS=[0.8, 0.9]))
    assert other.defaults["betas"] == (0.8, 0.9)
    adamw = build_optimizer(parameters, SolverOptions(OPTIM_METHOD="adamw", EPS=1e-6))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["eps"] == 1e-6
    sgd = build_optimizer(parameters, SolverOptions(OPTIM_METHOD="sgd", MOMENTUM=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.8


def test_gradients_are_clipped_and_cleared_after_the_step():
    model = nn.Linear(4, 1, bias=False)
    options = SolverOptions(OPTIM_METHOD="sgd", LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    solver = Solver(model, options, total_episodes=10, clip_grad=0.5)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((1, 4), 10.0)
    solver.step(1, solver.gradient_norm(), skip=torch.zeros(()))
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert model.weight.grad is None


def test_frozen_parameters_do_not_change():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert len(Solver(model, SolverOptions(), 10).parameters) == 2


# --- groups of parameters -----------------------------------------------------------------------------------


class Grouped(FewShotModel):
    """Two trained layers and a frozen one, with the given parameter groups."""

    def __init__(self, **factors: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.fast, self.slow = (nn.Linear(1, 1) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.factors = factors

    def parameter_groups(self) -> list[ParameterGroup]:
        decays = {"slow": 0.0}
        return [
            ParameterGroup(name, list(getattr(self, name).parameters()), factor, decays.get(name))
            for name, factor in self.factors.items()
        ]

    def encode(self, frames: Tensor) -> Tensor:
        return self.slow(self.fast(self.frozen(frames)))

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        raise NotImplementedError


def steps(model: Grouped, solver: Solver, first: int, last: int) -> None:
    for done in range(first, last):
        model.encode(torch.tensor([[done + 1.0]])).square().sum().backward()
        solver.step(done + 1, solver.gradient_norm(), skip=torch.zeros(()))


def test_each_group_has_its_rate_and_weight_decay():
    model = Grouped(frozen=1.0, fast=1.0, slow=0.25)
    options = SolverOptions(OPTIM_METHOD="sgd", LR=0.5, MOMENTUM=0.0, WEIGHT_DECAY=0.1)
    solver = Solver(model, options, total_episodes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in solver.parameters:
        parameter.grad = torch.ones_like(parameter)
    solver.step(1, solver.gradient_norm(), skip=torch.zeros(()))
    for name, value in model.state_dict().items():
        rate, decay = {"frozen": (0, 0), "fast": (0.5, 0.1), "slow": (0.125, 0)}[name.partition(".")[0]]
        torch.testing.assert_close(value, before[name] - rate * (1 + decay * before[name]))
    assert solver.learning_rate == 0.5


@pytest.mark.parametrize("method", ["adam", "adamw", "sgd"])
def test_groups_resume_bit_exact(method):
    options = SolverOptions(OPTIM_METHOD=method, LR=0.01, WEIGHT_DECAY=0.1, LR_SCH="cosine")
    whole, parts = Grouped(fast=1.0, slow=0.5), Grouped(fast=1.0, slow=0.5)
    solver = Solver(whole, options, 6)
    steps(whole, solver, 0, 6)
    first = Solver(parts, options, 6)
    steps(parts, first, 0, 3)
    second = Solver(parts, options, 6)
    second.restore(copy.deepcopy(first.optimizer.state_dict()))
    rates = [group["lr"] for group in second.optimizer.param_groups]
    assert rates == [first.learning_rate, 0.5 * first.learning_rate]
    steps(parts, second, 3, 6)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="groups"):
        Solver(Grouped(slow=0.5, fast=1.0), options, 6).restore(first.optimizer.state_dict())


def test_a_state_with_unnamed_groups_is_restored():
    model = nn.Linear(2, 1)
    solver = Solver(model, SolverOptions(), 10)
    model(torch.ones(1, 2)).sum().backward()
    solver.step(1, solver.gradient_norm(), skip=torch.zeros(()))
    stored = copy.deepcopy(solver.optimizer.state_dict())
    for key in ("name", "lr_factor"):
        del stored["param_groups"][0][key]
    resumed = Solver(model, SolverOptions(), 10)
    resumed.restore(stored)
    for number, kept in resumed.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, stored["state"][number][name]) for name, value in kept.items())


@pytest.mark.parametrize(("groups", "count"), [({"fast": 1.0}, 0), ({"fast": 1.0, "slow": 1.0, "again": 1.0}, 2)])
def test_each_trained_parameter_belongs_to_one_group(groups, count):
    model = Grouped(**groups)
    model.again = model.slow
    with pytest.raises(UserError, match=rf"Grouped\.parameter_groups.*slow\.weight in {count} groups"):
        Solver(model, SolverOptions(), 10)
