"""Tasks in several processes, of which any may crash: the task that did it is named, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_handles
from typing import TypeVar

from utils.jobs import leave_interrupts_to_the_parent

TASKS_PER_PROCESS = 1000  # then a fresh process takes over, as video decoders leak
AHEAD = 2  # tasks handed out for each process, so that none waits

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result | None]]:
    """Yield each task with its result, in the order in which they end; None for a task that ended its process.

    Args:
        work: a function of a module, called in the processes.
        tasks: what it is called with.
        workers: processes.

    Raises whatever `work` raises.
    """
    left = deque(tasks)
    while left:
        portion = deque(left.popleft() for _ in range(min(len(left), workers * TASKS_PER_PROCESS)))
        suspects: list[Task] = []
        yield from _together(work, portion, suspects, workers)
        left.extendleft(reversed(portion))  # what was not begun when a process ended
        for task in suspects:  # one of them did it; each gets a process of its own
            again: list[Task] = []
            yield from _together(work, deque([task]), again, 1)
            yield from ((crashed, None) for crashed in again)


def _together(
    work: Callable[[Task], Result], tasks: deque[Task], suspects: list[Task], workers: int
) -> Iterator[tuple[Task, Result | None]]:
    """Take tasks until there are none, or until a process ends; the tasks begun and lost then are the suspects."""
    # The caller may have imported torch, whose threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_start_worker)
    running: dict[Future[Result], Task] = {}
    try:
        while running or (tasks and not suspects):
            while tasks and not suspects and len(running) < AHEAD * workers:
                task = tasks.popleft()
                try:
                    running[pool.submit(work, task)] = task
                except BrokenProcessPool:
                    suspects.append(task)
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    suspects.append(task)
                    continue
                yield task, result
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, even where it is killed."""
    leave_interrupts_to_the_parent()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_handles([parent.sentinel])
        os._exit(1)
