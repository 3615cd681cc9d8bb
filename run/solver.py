"""Optimizer, learning rate and gradient clipping."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import is_plain_tensor
from utils.errors import UserError
from utils.schema import SolverOptions

# What each optimizer keeps for a parameter: tensors of its shape, or a single number.
KEPT = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


class Solver:
    """One optimizer whose learning rate is a pure function of the number of episodes seen."""

    def __init__(self, model: nn.Module, options: SolverOptions, total_episodes: int, clip_grad: float = 0.0) -> None:
        """Raises UserError when there are episodes to train on but no parameter to train.

        `clip_grad` is the largest norm that the gradient of a step may have; 0: no limit.
        """
        self.options, self.total, self.clip_grad = options, total_episodes, clip_grad
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if total_episodes and not self.parameters:
            raise UserError(
                "this method has no parameter to train: set TRAIN.TRAIN_EPISODES=0 to test it as it is, or "
                "MODEL.TRAINABLE=all if it is to train its backbone"
            )
        self.optimizer = build_optimizer(self.parameters, options)
        self.learning_rate = 0.0

    @torch.no_grad()
    def restore(self, stored: dict[str, Any]) -> None:
        """Restores what the optimizer's `state_dict` returned; its options stay those of the config.

        PyTorch does not compare shapes or layout in memory, without which a fused optimizer would read and write
        memory of other tensors.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is not the state of this optimizer.
        """
        own, state = self.optimizer.state_dict(), {}
        own["param_groups"][0]["lr"] = float(stored["param_groups"][0]["lr"])
        parameters = dict(enumerate(self.parameters))
        for number, kept in stored["state"].items():
            parameter = parameters[number]
            like = {name: torch.zeros(()) if name == "step" else parameter for name in KEPT[self.options.OPTIM_METHOD]}
            if kept.keys() != like.keys() or not all(_fits(kept[name], like[name]) for name in like):
                raise ValueError("the optimizer's state is not finite or does not fit its parameters")
            state[number] = {name: torch.empty_like(one).copy_(kept[name]) for name, one in like.items()}
        self.optimizer.load_state_dict({**own, "state": state})

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together: float [] on their device."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, episodes_done: int, gradient_norm: Tensor, skip: Tensor) -> None:
        """One step with the gradients of a whole group of episodes, which are cleared afterwards.

        Args:
            episodes_done: episodes seen, including those of this step.
            gradient_norm: what `gradient_norm` returned.
            skip: float32 [] on the parameters' device; where it is 1, weights and optimizer stay as they are.
        """
        self.learning_rate = self.options.LR * rate_factor(self.options, episodes_done, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, gradient_norm)
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # what torch's own gradient scaler sets
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _fits(value: Any, like: Tensor) -> bool:
    return is_plain_tensor(value) and value.shape == like.shape and bool(value.isfinite().all())


def build_optimizer(parameters: list[nn.Parameter], options: SolverOptions) -> torch.optim.Optimizer:
    """Adam (published betas 0.5 and 0.999 by default) or SGD with momentum.

    Fused, on CPUs too: one pass over the memory, and a step that can be skipped without asking the device.
    """
    common: dict[str, Any] = {"lr": options.LR, "weight_decay": options.WEIGHT_DECAY, "fused": True}
    groups = [{"params": parameters}]  # torch takes an empty group but no empty list, and a method may train nothing
    if options.OPTIM_METHOD == "sgd":
        return torch.optim.SGD(groups, momentum=options.MOMENTUM, **common)
    return torch.optim.Adam(groups, betas=(options.BETAS[0], options.BETAS[1]), **common)


def rate_factor(options: SolverOptions, episodes_done: int, total: int) -> float:
    """What the base learning rate is multiplied with after a number of episodes, in [0, 1].

    Args:
        options: reads LR_SCH (none, cosine, or milestones in episodes, each of which divides by ten) and
            WARMUP_EPISODES (a linear rise from zero).
        episodes_done: episodes seen, including those of the step to be taken.
        total: episodes of the whole run.
    """
    warmup = min(1.0, episodes_done / options.WARMUP_EPISODES) if options.WARMUP_EPISODES else 1.0
    schedule = options.LR_SCH
    if schedule == "none":
        return warmup
    if schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, episodes_done / total)))
    milestones = [schedule] if isinstance(schedule, int) else schedule
    return warmup * 0.1 ** sum(episodes_done > int(milestone) for milestone in milestones)
