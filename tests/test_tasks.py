"""Work for many items, some at a time."""

import asyncio

import pytest

from zarr_cae.tasks import for_each


async def _numbers(count):
    for number in range(count):
        await asyncio.sleep(0)
        yield number


@pytest.mark.parametrize("count", [100, 0])
@pytest.mark.parametrize("kind", [range, _numbers])
def test_each_item_is_worked_on_once_and_some_at_a_time(kind, count):
    async def main():
        done, running, most = [], 0, 0

        async def work(item):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done.append(item)

        await for_each(kind(count), work)
        return done, most

    done, most = asyncio.run(main())
    assert sorted(done) == list(range(count))
    assert most <= 16
    if kind is range:
        assert most == min(count, 16)


def test_the_first_error_cancels_the_others():
    cancelled = []

    async def work(item):
        if item == 3:
            raise ValueError("item 3")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(ValueError, match="item 3"):
        asyncio.run(for_each(range(10), work))
    assert sorted(cancelled) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
