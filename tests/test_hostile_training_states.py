"""A training state is restored, or refused in one sentence; an impossible state is never resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from episodes.dataset import BadClips
from run.meter import Meter
from run.run_directory import TrainingState
from run.solver import Solver
from utils.errors import UserError
from utils.schema import SolverOptions


def training(method: str) -> TrainingState:
    """Returns the training state of a small model after one step."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 1))
    solver, cpu = Solver(model, SolverOptions(OPTIM_METHOD=method), total_episodes=4), torch.device("cpu")
    state = TrainingState(model, solver, Meter(cpu), BadClips(0), episode=1, kept=[1])  # type: ignore[arg-type]
    model(torch.ones(1, 2, 2, 2)).sum().backward()
    solver.step(1, solver.gradient_norm(), skip=torch.zeros(()))
    state.meter.sums, state.meter.episodes = {"loss": torch.tensor(1.5)}, 1
    return state


def assert_refused(state: TrainingState, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*x\.pt[^\n]*the training state in it is damaged[^\n]*$"):
        state.restore(content, Path("x.pt"))


@pytest.mark.parametrize("method", ["adam", "adamw", "sgd"])
def test_a_restored_state_has_the_memory_layout_of_its_weights(method: str) -> None:
    content, state = copy.deepcopy(training(method).content()), training(method)
    state.model[0].to(memory_format=torch.channels_last)  # type: ignore[index]
    state.restore(content, Path("x.pt"))
    found = state.content()["optimizer"]
    assert found["param_groups"] == content["optimizer"]["param_groups"]
    for number, kept in content["optimizer"]["state"].items():
        assert all(torch.equal(value, found["state"][number][name]) for name, value in kept.items())
    weight = state.solver.parameters[0]
    moments = [value for value in state.solver.optimizer.state[weight].values() if value.shape]
    assert moments
    assert all(value.stride() == weight.stride() for value in moments)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1), torch.zeros(1, 2), torch.full((3, 2, 2, 2), float("nan")), torch.zeros(1).to_sparse(), None, 7],
    ids=["short", "another shape", "not finite", "sparse", "none", "a number"],
)
@pytest.mark.parametrize(("method", "name"), [("adam", "exp_avg"), ("adam", "step"), ("sgd", "momentum_buffer")])
def test_a_moment_of_the_wrong_shape_is_refused(method: str, name: str, value: Any) -> None:
    """A fused optimizer would accept it and write out of bounds."""
    state = training(method)
    content = copy.deepcopy(state.content())
    content["optimizer"]["state"][0][name] = value
    assert_refused(state, content)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": 3}, {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": {"state": {9: {}}, "param_groups": [{"lr": 0.1}]}},
        {"optimizer": {"state": {0: {}}, "param_groups": [{"lr": 0.1}]}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": "fast", "params": [0, 1, 2, 3]}]}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.1, "params": [2, 3]}]}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3], "name": "head"}]}},
        {"meter": 7}, {"meter": []}, {"meter": [{"episodes": "x"}]}, {"meter": [{"loss": torch.zeros(2)}]},
        {"meter": [{"episodes": float("nan")}]}, {"episode": -5}, {"best_accuracy": "x"},
        {"best_accuracy": float("nan")}, {"validation_due": "no"}, {"kept": 5}, {"kept": ["/../mine"]},
        {"bad_clips": [1]}, {"bad_clips": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_training_state_is_refused(changes: dict[str, Any]) -> None:
    state = training("adam")
    content = {**copy.deepcopy(state.content()), **changes}
    assert_refused(state, content)
