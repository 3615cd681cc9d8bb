"""Job of test_elastic.py: the main command in two processes, the second of which fails at the first two starts.

At the first start it is sent SIGTERM during an episode, at the second SIGKILL, at the third nothing.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from run.command import run_command
from run.run import main
from run.training_step import TrainingStep
from tests.helpers.processes import launch

# Start -> the episode, one of the second of two processes, and the signal.
SIGNALS = {0: (3, signal.SIGTERM), 1: (7, signal.SIGKILL)}


def send_signal_at_episode() -> None:
    """Sends this process its signal at its episode."""
    episode_number, signal_number = SIGNALS.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), (-1, 0))
    forward = TrainingStep.forward

    def forward_and_signal(step: TrainingStep, episode: Any) -> Any:
        if episode.index == episode_number:
            os.kill(os.getpid(), signal_number)
        return forward(step, episode)

    TrainingStep.forward = forward_and_signal  # type: ignore[method-assign]


def job() -> None:
    send_signal_at_episode()
    try:
        run_command(main)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    launch(job, restarts=2)
