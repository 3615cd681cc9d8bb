"""What a process that reads videos for a data loader does besides: it takes one thread, and obeys its parent only."""

import os
import signal
import sys
import threading

import torch


def set_up_worker(worker: int) -> None:
    """Called by the data loader in each new worker.

    One thread each, since workers are many. A signal to the whole run (Ctrl-C, SIGTERM, SIGUSR1) is left to the main
    process, which finishes its step with the clips that the workers read, and ends them afterwards.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform != "darwin":  # which cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    """Waits for the SIGTERM with which the main process ends its workers; ignores those of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
