"""The bounded queue of a server: clients take turns, so one with a thousand texts delays nobody else by much."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """Anything that belongs to a client."""

    client: str


T = TypeVar("T", bound=Owned)


class FairQueue(Generic[T]):
    """First come first served within a client, in turns between clients. Not thread-safe: the caller locks.

    Args:
        size: Places in all, including entries taken out with :meth:`take` until :meth:`release` gives them back.
        share: Places of one client.
    """

    def __init__(self, size: int, share: int) -> None:
        self.size, self.share = size, share
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._held: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def held(self) -> int:
        """Places taken, by entries that wait and by those at work."""
        return self._total

    def room(self, client: str, count: int) -> bool:
        """Whether ``count`` more entries of a client fit. Without the lock the answer may be a moment old."""
        return self._total + count <= self.size and self._held[client] + count <= self.share

    def put(self, entry: T) -> None:
        """Append an entry; the caller has asked :meth:`room`."""
        self._held[entry.client] += 1
        self._total += 1
        self._waiting.setdefault(entry.client, deque()).append(entry)

    def take(self) -> T | None:
        """The next entry, of the client whose turn it is; it keeps its place until :meth:`release`."""
        if not self._waiting:
            return None
        client, entries = next(iter(self._waiting.items()))
        entry = entries.popleft()
        if entries:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return entry

    def sweep(self, is_over: Callable[[T], bool]) -> None:
        """Take out every waiting entry of which ``is_over`` is true; their places are free at once.

        One pass whatever the number taken out: when a thousand clients leave, each is not searched for.
        """
        for client, entries in list(self._waiting.items()):
            kept: deque[T] = deque()
            for entry in entries:
                if is_over(entry):
                    self.release(entry)
                else:
                    kept.append(entry)
            if not kept:
                del self._waiting[client]
            elif len(kept) < len(entries):
                self._waiting[client] = kept

    def release(self, entry: T) -> None:
        """Give the place of an entry back."""
        self._total -= 1
        self._held[entry.client] -= 1
        if self._held[entry.client] <= 0:
            del self._held[entry.client]
