"""Turns of adapters: requests for one adapter run together, those for another wait until these have ended.

One batch cannot hold several full-rank updates, and a running request must keep its weights to its end. Who comes
while somebody waits joins the end of the queue, so that nobody waits for more than one turn of each other adapter.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable

_NOBODY = object()


class Turns:
    """`enter` and `leave` around each request. prepare: makes a key the active one, while nothing runs.

    Where `prepare` fails, all who wait for that key get its error. An object() as key is a turn that nobody shares.
    """

    def __init__(self, prepare: Callable[[Hashable], Awaitable[None]]):
        self.running = 0
        self._prepare = prepare
        self._now: Hashable = _NOBODY
        self._outdated = False  # while it prepares: what it prepares for has another meaning by now
        self._queue: dict[Hashable, list[asyncio.Future[None]]] = {}  # who waits for each key, in the order of turns
        self._preparing: asyncio.Task[None] | None = None

    async def enter(self, key: Hashable) -> None:
        """Wait for the key's turn. Cancelled or with an error, the turn was not taken."""
        if key == self._now and not self._queue:
            self.running += 1
            return
        mine = asyncio.get_running_loop().create_future()
        self._queue.setdefault(key, []).append(mine)
        self._next_turn()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:  # admitted in the same moment
                self.running -= 1
            self._next_turn()
            raise

    def leave(self) -> None:
        """The request has ended."""
        self.running -= 1
        self._next_turn()

    def forget_prepared(self) -> None:
        """Prepare anew for whoever waits, or comes next: the keys have another meaning now."""
        self._now = _NOBODY
        self._outdated = True

    def _next_turn(self) -> None:
        while self._queue and self._preparing is None:
            key, waiting = next(iter(self._queue.items()))
            if key == self._now or all(one.done() for one in waiting):  # done: cancelled
                self._admit(self._queue.pop(key))
            elif self.running:
                return
            else:
                self._preparing = asyncio.ensure_future(self._prepare_for(key))

    async def _prepare_for(self, key: Hashable) -> None:
        self._now, self._outdated, failed = _NOBODY, False, None
        try:
            await self._prepare(key)
        except Exception as error:
            failed = error
        finally:
            self._preparing = None
        if not self._outdated:  # or else once more: who waits may have come after the change
            self._now = key if failed is None else _NOBODY
            self._admit(self._queue.pop(key), failed)
        self._next_turn()

    def _admit(self, waiting: Iterable[asyncio.Future[None]], failed: Exception | None = None) -> None:
        for one in waiting:
            if one.done():
                continue
            if failed is None:
                self.running += 1
                one.set_result(None)
            else:
                one.set_exception(failed)
