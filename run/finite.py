"""Whether losses and gradients are finite, found out without waiting for the device at every step."""

import torch
from torch import Tensor

from utils.errors import UserError


class NotFiniteError(UserError):
    """A group of training episodes had a loss or a gradient that is not finite; its step was not made.

    Attributes:
        group: the numbers of the episodes.
    """

    def __init__(self, group: range, loss: float, gradient_norm: float) -> None:
        self.group = group
        super().__init__(
            f"the loss ({loss:g}) or the norm of the gradient ({gradient_norm:g}) of training episodes {group.start} "
            f"to {group.stop - 1} is not finite; no checkpoint was written since: start a new run with a "
            f"lower SOLVER.LR or with TRAIN.CLIP_GRAD, since a resumed one keeps both"
        )


class FiniteWatch:
    """Looks at every group before its optimizer step, and remembers the first that is not finite.

    A GPU works through a queue of steps, and to ask it for a number means to wait until the queue is empty. So the
    answer stays there, as the flag `found`, and makes the fused optimizers skip the step and all later ones: weights
    and optimizer stay as they were. The host asks (`refuse`) before it logs, validates or saves, and so before any
    checkpoint. On a CPU nothing is queued, and it asks at every step.

    Attributes:
        found: float32 [] on the device, 1 from the first group on that is not finite.
        asks_at_once: whether `look` itself refuses.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        self.asks_at_once = device.type == "cpu"
        self._first = torch.zeros(4, dtype=torch.float64, device=device)  # start and stop of the group, loss, norm

    def look(self, group: range, loss: Tensor, gradient_norm: Tensor) -> None:
        """Takes note of a group: its mean loss and the norm of its gradient, both float []; the same on all processes.

        Raises:
            NotFiniteError: one of them is not finite, and the device is a CPU.
        """
        start, stop = (torch.full_like(self.found, number, dtype=torch.float64) for number in (group.start, group.stop))
        seen = torch.stack((start, stop, loss.double(), gradient_norm.double()))
        is_bad = ~seen.isfinite().all()
        self._first = torch.where(is_bad & (self.found == 0), seen, self._first)
        self.found = torch.where(is_bad, 1.0, self.found)
        if self.asks_at_once:
            self.refuse()

    def refuse(self) -> None:
        """Waits for the device.

        Raises:
            NotFiniteError: a group that was looked at was not finite.
        """
        if self.found.item():
            start, stop, loss, norm = self._first.tolist()
            raise NotFiniteError(range(int(start), int(stop)), loss, norm)
