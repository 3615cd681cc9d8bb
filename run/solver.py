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
        """Takes over what the optimizer's `state_dict` returned, but for its options, which are those of the config.

        Raises:
            ValueError: it is not the state of these parameters. PyTorch would not notice, and the fused optimizers
                read and write memory that is not theirs then.
        """
        own = self.optimizer.state_dict()
        of_parameter, rate = stored["state"], stored["param_groups"][0]["lr"]
        if type(rate) is not float or not set(of_parameter) <= set(range(len(self.parameters))):
            raise ValueError("the optimizer has other parameters")
        state = {number: self._laid_out(self.parameters[number], kept) for number, kept in of_parameter.items()}
        own["param_groups"][0]["lr"] = rate
        self.optimizer.load_state_dict({**own, "state": state})

    def _laid_out(self, parameter: nn.Parameter, kept: dict[str, Any]) -> dict[str, Any]:
        """What is kept for a parameter, in memory as the parameter is."""
        if kept.keys() != KEPT[self.options.OPTIM_METHOD]:
            raise ValueError("the optimizer is another one")
        for name, value in kept.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if not (is_plain_tensor(value) and value.shape == shape and value.isfinite().all()):
                raise ValueError(f"the optimizer's {name} does not fit its parameter")
        return {name: v if name == "step" else torch.empty_like(parameter).copy_(v) for name, v in kept.items()}

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
