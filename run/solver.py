"""Optimizer, learning rate and gradient clipping."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.base import FewShotModel, ParameterGroup
from utils.checkpoint import is_plain_tensor
from utils.errors import UserError
from utils.schema import SolverOptions

# optimizer -> names of its state for one parameter; each is a tensor of the parameter's shape, but "step" a number
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}
STATE_NAMES = {"adam": ADAM_STATE, "adamw": ADAM_STATE, "sgd": {"momentum_buffer"}}


class Solver:
    """An optimizer whose learning rate is a pure function of the number of episodes seen.

    Attributes:
        parameters: all trainable parameters, group by group.
        learning_rate: learning rate of the last step, without the groups' factors.
    """

    def __init__(self, model: nn.Module, options: SolverOptions, total_episodes: int, clip_grad: float = 0.0) -> None:
        """Builds the optimizer.

        Args:
            model: a method, or any other module; the parameters of the latter form one group.
            options: the SOLVER section.
            total_episodes: training episodes of the whole run.
            clip_grad: largest norm of the gradient of a step; 0: no limit.

        Raises:
            UserError: there are training episodes but no trainable parameter, or the method's groups leave out a
                trainable parameter.
        """
        self.options, self.total, self.clip_grad = options, total_episodes, clip_grad
        groups = trained_groups(model)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        if total_episodes and not self.parameters:
            raise UserError(
                "this method has no parameter to train: set TRAIN.TRAIN_EPISODES=0 to test it without training, or "
                "MODEL.TRAINABLE=all to train its backbone"
            )
        self.optimizer = build_optimizer(groups, options)
        self.learning_rate = 0.0

    @torch.no_grad()
    def restore(self, stored: dict[str, Any]) -> None:
        """Restores a `state_dict` of the optimizer, except its options, which come from the config.

        PyTorch does not check shapes and memory layout. If they were wrong, a fused optimizer would read and write the
        memory of other tensors.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: this is not the state of this optimizer.
        """
        own, state = self.optimizer.state_dict(), {}
        for group, before in zip(own["param_groups"], stored["param_groups"], strict=True):
            # Checkpoints from before groups had names hold one group.
            if (group["params"], group["name"]) != (before["params"], before.get("name", "all")):
                raise ValueError("the optimizer's groups of parameters differ")
            group["lr"] = float(before["lr"])
        parameters, names = dict(enumerate(self.parameters)), STATE_NAMES[self.options.OPTIM_METHOD]
        for number, values in stored["state"].items():
            like = {name: torch.zeros(()) if name == "step" else parameters[number] for name in names}
            if values.keys() != like.keys() or not all(_fits(values[name], like[name]) for name in like):
                raise ValueError("the optimizer's state is not finite or does not fit its parameters")
            state[number] = {name: torch.empty_like(one).copy_(values[name]) for name, one in like.items()}
        self.optimizer.load_state_dict({**own, "state": state})

    def gradient_norm(self) -> Tensor:
        """Returns the Euclidean norm of all gradients: float [] on their device."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, episodes_done: int, gradient_norm: Tensor, skip: Tensor) -> None:
        """Performs one step with the gradients of a group of episodes, and clears the gradients.

        Args:
            episodes_done: episodes seen, including those of this step.
            gradient_norm: float [], from `gradient_norm`.
            skip: float32 [] on the parameters' device; if it is 1, weights and optimizer state do not change.
        """
        self.learning_rate = self.options.LR * rate_factor(self.options, episodes_done, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_factor"]
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, gradient_norm)
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _fits(value: Any, like: Tensor) -> bool:
    return is_plain_tensor(value) and value.shape == like.shape and bool(value.isfinite().all())


def trained_groups(model: nn.Module) -> list[ParameterGroup]:
    """Returns a model's groups without frozen parameters.

    Raises:
        UserError: a trained parameter is in no group, and so would never change, or in several.
    """
    everything = [ParameterGroup("all", list(model.parameters()))]
    groups = model.parameter_groups() if isinstance(model, FewShotModel) else everything
    groups = [group._replace(parameters=[p for p in group.parameters if p.requires_grad]) for group in groups]
    counts: dict[int, int] = {}
    for parameter in (parameter for group in groups for parameter in group.parameters):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (count := counts.get(id(parameter), 0)) != 1:
            raise UserError(
                f"{type(model).__name__}.parameter_groups has the parameter {name} in {count} groups: put it into one, "
                "or freeze it"
            )
    return groups


def build_optimizer(groups: Sequence[ParameterGroup], options: SolverOptions) -> torch.optim.Optimizer:
    """Returns Adam (by default with the published betas 0.5 and 0.999), AdamW, or SGD with momentum.

    All are fused, on CPUs too: one pass over memory, and a step can be skipped without waiting for the device.
    """
    settings = [
        {
            "params": group.parameters,  # torch accepts an empty group, but not an empty list
            "name": group.name,
            "lr": options.LR * group.lr_factor,
            "lr_factor": group.lr_factor,
            "weight_decay": options.WEIGHT_DECAY if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]
    if options.OPTIM_METHOD == "sgd":
        return torch.optim.SGD(settings, momentum=options.MOMENTUM, fused=True)
    adam = torch.optim.AdamW if options.OPTIM_METHOD == "adamw" else torch.optim.Adam
    return adam(settings, betas=(options.BETAS[0], options.BETAS[1]), eps=options.EPS, fused=True)


def rate_factor(options: SolverOptions, episodes_done: int, total: int) -> float:
    """Returns the factor of the base learning rate after a number of episodes.

    Args:
        options: LR_SCH (none, cosine, or milestones in episodes), LR_FACTORS (the factor after each milestone; null:
            each divides by ten), and WARMUP_EPISODES, over which the rate rises linearly from WARMUP_FACTOR.
        episodes_done: episodes seen, including those of the current step.
        total: episodes of the whole run.
    """
    warmup = 1.0
    if options.WARMUP_EPISODES:
        part = min(1.0, episodes_done / options.WARMUP_EPISODES)
        warmup = options.WARMUP_FACTOR + (1 - options.WARMUP_FACTOR) * part
    if options.LR_SCH == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, episodes_done / total)))
    passed = sum(episodes_done > milestone for milestone in options.milestones)
    if options.LR_FACTORS is None:
        return warmup * 0.1**passed
    return warmup * [1.0, *options.LR_FACTORS][passed]
