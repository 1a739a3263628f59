"""Requests for one adapter run together; those for another wait for their end, in order of arrival."""

import asyncio

import pytest

from dual_lora.serving.turns import Turns


class Log:
    """Turns whose every event is written down, and requests that end when they are told to."""

    def __init__(self, broken=()):
        self.events, self.broken, self.preparing = [], set(broken), asyncio.Event()
        self.preparing.set()
        self.turns = Turns(self.prepare)

    async def prepare(self, key):
        assert self.turns.running == 0, "others still run"
        await self.preparing.wait()
        self.events.append(f"prepare {key}")
        if key in self.broken:
            raise RuntimeError(f"{key} is broken")

    def request(self, key):
        end = asyncio.Event()

        async def run():
            await self.turns.enter(key)
            self.events.append(f"start {key}")
            try:
                await end.wait()
            finally:
                self.events.append(f"end {key}")
                self.turns.leave()

        return asyncio.ensure_future(run()), end


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def test_others_wait_and_nobody_is_overtaken_for_ever():
    async def main():
        log = Log()
        first = [log.request("a"), log.request("a")]
        await settled()
        assert log.events == ["prepare a", "start a", "start a"]
        other = [log.request("b")]
        late = [log.request("a"), log.request("a")]
        other.append(log.request("b"))
        await settled()
        assert log.events[3:] == [], "b waits for both of a, and the late ones for b"
        for _, end in first:
            end.set()
        await settled()
        assert log.events[3:] == ["end a", "end a", "prepare b", "start b", "start b"]
        for _, end in other:
            end.set()
        await settled()
        assert log.events[8:] == ["end b", "end b", "prepare a", "start a", "start a"]
        for _, end in late:
            end.set()
        await asyncio.gather(*(task for task, _ in (*first, *other, *late)))
        assert log.turns.running == 0

    asyncio.run(main())


def test_a_failure_is_everybodys_who_waits_and_nobody_elses():
    async def main():
        log = Log(broken=["b"])
        log.preparing.clear()
        broken = [log.request("b")[0]]
        await settled()
        broken.append(log.request("b")[0])  # while it is being prepared
        fine, end = log.request("a")
        log.preparing.set()
        end.set()
        for task in broken:
            with pytest.raises(RuntimeError, match="b is broken"):
                await task
        await fine
        assert log.events == ["prepare b", "prepare a", "start a", "end a"]
        assert log.turns.running == 0

    asyncio.run(main())


@pytest.mark.parametrize("when", ["waits", "is admitted"])
def test_who_gives_up_blocks_nobody(when):
    async def main():
        log = Log()
        first, end = log.request("a")
        await settled()
        gone, _ = log.request("b")
        last, last_end = log.request("a")
        await settled()
        if when == "waits":
            gone.cancel()
            await settled()
            assert log.events == ["prepare a", "start a", "start a"], "none is prepared for whom nobody waits"
            end.set()
        else:
            end.set()
            while "prepare b" not in log.events:
                await asyncio.sleep(0)
            gone.cancel()
        last_end.set()
        await asyncio.gather(first, last)
        assert gone.cancelled() or when != "waits"
        assert log.turns.running == 0
        await asyncio.wait_for(log.turns.enter("c"), 1)

    asyncio.run(main())


def test_another_meaning_of_the_same_key():
    async def main():
        log = Log()
        first, end = log.request("a")
        await settled()
        log.turns.forget_prepared()
        second, second_end = log.request("a")
        await settled()
        assert log.events == ["prepare a", "start a"], "the second one is of the new meaning"
        end.set()
        second_end.set()
        await asyncio.gather(first, second)
        assert log.events == ["prepare a", "start a", "end a", "prepare a", "start a", "end a"]

        log.preparing.clear()
        third, third_end = log.request("b")
        await settled()
        log.turns.forget_prepared()  # while it is being prepared
        fourth, fourth_end = log.request("b")
        await settled()
        log.preparing.set()
        third_end.set()
        fourth_end.set()
        await asyncio.gather(third, fourth)
        assert log.events[6:10] == ["prepare b", "prepare b", "start b", "start b"], "the fourth is of the new meaning"


def test_an_old_meaning_that_cannot_be_prepared_is_no_failure_of_the_new_one():
    async def main():
        log = Log(broken={"a"})
        log.preparing.clear()
        one, end = log.request("a")
        await settled()
        log.turns.forget_prepared()
        log.broken.clear()
        log.preparing.set()
        end.set()
        await one
        assert log.turns.running == 0

    asyncio.run(main())

    asyncio.run(main())
