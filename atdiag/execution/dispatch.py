"""Which job goes where: the longest job that waits goes to the place that is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Dispatch:
    """Jobs that wait, by index, and the place of each that runs. Knows no clock, no process and no machine."""

    def __init__(self, jobs: int, places: int) -> None:
        """jobs: how many, in the order in which they are started. places: how many run side by side."""
        self._waiting = deque(range(jobs))
        self._free = deque(range(places))
        self._at: dict[int, int] = {}

    @property
    def over(self) -> bool:
        """Whether no job waits or runs."""
        return not self._waiting and not self._at

    def starts(self) -> list[tuple[int, int]]:
        """Return what starts now, as (job, place): jobs that wait, as far as places are free."""
        out = []
        while self._waiting and self._free:
            job, place = self._waiting.popleft(), self._free.popleft()
            self._at[job] = place
            out.append((job, place))
        return out

    def ended(self, job: int) -> None:
        """Free the place of a job that has ended."""
        self._free.append(self._at.pop(job))

    def lost(self, jobs: Sequence[int], place_too: bool = False) -> None:
        """Put jobs that were interrupted first in the queue again; place_too: their places are gone, too."""
        for job in reversed(jobs):
            place = self._at.pop(job)
            if not place_too:
                self._free.append(place)
            self._waiting.appendleft(job)

    def opened(self, place: int) -> None:
        """Add a place, such as a node that came back."""
        self._free.append(place)
