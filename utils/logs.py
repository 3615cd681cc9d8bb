"""Logging to the terminal, without breaking progress bars, and with dates to the log file of a run."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from utils.jobs import is_main_process

LOG = "log.txt"  # in the run directory
FILE_ONLY = {"is_file_only": True}  # the `extra` of a log line that is already on the terminal


def set_up_logging(log_file: Path | None = None) -> None:
    """Sends log lines to standard error, and with dates to `log_file`; may be called again.

    Earlier lines are kept until there is a file, so that it covers the whole run. Of several processes, only the main
    one logs everything; the others log errors.
    """
    terminal, file = _TqdmHandler(), _LogFile(log_file, _waiting_lines())
    terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    terminal.addFilter(lambda record: not hasattr(record, "is_file_only"))
    for handler in (terminal, file):
        handler.addFilter(_is_own_line_or_error)
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, handlers=[terminal, file], force=True)
    logging.captureWarnings(True)
    file.flush()


class _TqdmHandler(logging.StreamHandler):
    """A handler that writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(MemoryHandler):
    """A handler that keeps log lines until there is a file, then writes each immediately."""

    def __init__(self, path: Path | None, waiting: list[logging.LogRecord]) -> None:
        super().__init__(capacity=0, target=_DatedFile(path) if path else None)
        self.buffer = waiting

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        return True

    def close(self) -> None:
        target = self.target
        super().close()
        if target:
            target.close()


def _waiting_lines() -> list[logging.LogRecord]:
    """Returns the lines logged before there was a file."""
    return [line for handler in logging.root.handlers if isinstance(handler, _LogFile) for line in handler.buffer]


class _DatedFile(logging.FileHandler):
    """A log file that a full disk may cut off; standard error has the same lines."""

    is_cut_off = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.is_cut_off:
            self.is_cut_off = True
            tqdm.write(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


def _is_own_line_or_error(record: logging.LogRecord) -> bool:
    """Accepts lines of this project and errors of libraries, but no other lines of libraries."""
    root = str(Path(__file__).resolve().parents[1])
    is_own_line = record.pathname.startswith(root) and "site-packages" not in record.pathname
    return is_own_line or record.levelno >= logging.ERROR
