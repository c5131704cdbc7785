"""Work for many items on one event loop, some items at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")

_AT_A_TIME = 16
"""Chunks in work at one time: enough to overlap reading with decoding, few enough to bound the memory."""


async def for_each(items: Iterable[_Item] | AsyncIterable[_Item], work: Callable[[_Item], Awaitable[object]]) -> None:
    """Await `work` for each item, 16 items at a time; the first error cancels what is running, and is raised."""
    pending = _iterate(items)
    turn = asyncio.Lock()  # an asynchronous generator serves one task at a time

    async def worker() -> None:
        while True:
            async with turn:
                try:
                    item = await anext(pending)
                except StopAsyncIteration:
                    return
            await work(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(_AT_A_TIME)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _iterate(items: Iterable[_Item] | AsyncIterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
