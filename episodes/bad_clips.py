"""Clips that cannot be read while a training runs: how many, which, and when the run stops."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from episodes.class_lists import MOST_PROBLEMS_SHOWN
from utils import distributed
from utils.errors import UserError

logger = logging.getLogger(__name__)


class _NamesBadClips(Protocol):
    @property
    def bad_clips(self) -> dict[str, str]: ...


AnyEpisode = TypeVar("AnyEpisode", bound=_NamesBadClips)


class BadClips:
    """The training videos that could not be read so far, each once: name -> why."""

    def __init__(self, most: int) -> None:
        """Takes DATA.MAX_BAD_CLIPS, the number of videos that are tolerated."""
        self.most = most
        self.reasons: dict[str, str] = {}

    def watch(self, episodes: Iterable[AnyEpisode]) -> Iterator[AnyEpisode]:
        """Passes episodes on, and adds the bad clips that each of them names.

        Raises:
            UserError: they are more than DATA.MAX_BAD_CLIPS now.
        """
        for episode in episodes:
            self._add(episode.bad_clips)
            yield episode

    def share(self) -> None:
        """Tells all processes what each of them has found; they call this together.

        Raises:
            UserError: as `watch`.
        """
        for found in distributed.gather(dict(self.reasons)):
            self._add(found)

    def _add(self, found: Mapping[str, str]) -> None:
        """Counts and logs the bad clips that were not known yet."""
        for name, reason in found.items():
            if name not in self.reasons:
                self.reasons[name] = reason
                logger.warning("another video of its class takes the place of %s: %s", name, reason)
        refuse_too_many(self.reasons, self.most)


def refuse_too_many(reasons: Mapping[str, str], most: int) -> None:
    """Raises a UserError, naming the videos, if there are more than DATA.MAX_BAD_CLIPS."""
    if len(reasons) <= most:
        return
    names = list(reasons)
    more = f" and {len(names) - MOST_PROBLEMS_SHOWN} more" if len(names) > MOST_PROBLEMS_SHOWN else ""
    raise UserError(
        f"{len(names)} training videos cannot be read, DATA.MAX_BAD_CLIPS tolerates {most}: "
        f"{', '.join(names[:MOST_PROBLEMS_SHOWN])}{more}; prepare them again, take them out of the list, or raise "
        f"DATA.MAX_BAD_CLIPS (the last one: {reasons[names[-1]]})"
    )
