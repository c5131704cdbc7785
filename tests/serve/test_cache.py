"""`ByteCache`, `SharedWork` and `ByteLimit`: values are kept, made once, and held back."""

import asyncio
import os
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_cae.serve.cache import ByteCache, ByteLimit, SharedWork


@given(st.integers(0, 30), st.lists(st.tuples(st.sampled_from("abcdef"), st.binary(max_size=12))))
def test_a_cache_keeps_the_values_used_last(limit, steps):
    cache, kept = ByteCache(limit), {}
    for key, value in steps:
        cache.put(key, value)
        kept.pop(key, None)
        kept[key] = value
        while sum(map(len, kept.values())) > limit:
            del kept[next(iter(kept))]
        for name in "abcdef":
            assert cache.get(name) == kept.get(name)
        kept = {name: kept[name] for name in "abcdef" if name in kept}  # reading them used them, in this order


def test_forgetting_by_prefix():
    cache = ByteCache(100)
    for key in ("a/c/0", "ab/c/0", "b/c/0"):
        cache.put(key, b"12")
    cache.forget("a/")
    assert [cache.get(key) for key in ("a/c/0", "ab/c/0", "b/c/0")] == [None, b"12", b"12"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_while_other_threads_use_the_cache():
    cache, done = ByteCache(100), threading.Event()
    cache.put("a", b"1")

    def use():
        while not done.is_set():
            cache.put("b", b"2")
            cache.get("a")

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                signal.alarm(60)  # ends a child that waits for the lock
                os._exit(cache.get("a") != b"1")
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_an_error_reaches_all_waiting_callers_and_is_not_kept():
    calls = []

    async def fail():
        calls.append(1)
        await asyncio.sleep(0)
        raise ValueError("no")

    async def main():
        work = SharedWork()
        found = await asyncio.gather(*(work.result("a", fail) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, ValueError) for error in found)
        with pytest.raises(ValueError, match="no"):
            await work.result("a", fail)

    asyncio.run(main())
    assert len(calls) == 2


def test_work_that_none_waits_for_is_cancelled():
    async def main():
        cancelled, work = asyncio.Event(), SharedWork()

        async def long():
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        waiting = [asyncio.ensure_future(work.result("a", long)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert not cancelled.is_set()
        waiting[1].cancel()
        await asyncio.wait_for(cancelled.wait(), 60)

    asyncio.run(main())


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.booleans()), max_size=30))
def test_a_limit_is_kept_and_all_get_their_turn(works):
    async def main():
        limit, held, most, served = ByteLimit(10), 0, 0, 0

        async def work(size, steps):
            nonlocal held, most, served
            async with limit.holding(size):
                held += min(size, 10)
                most = max(most, held)
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    held -= min(size, 10)
                served += 1

        tasks = [asyncio.ensure_future(work(size, steps)) for size, steps, _ in works]
        await asyncio.sleep(0)
        for task, (*_, cancel) in zip(tasks, works, strict=True):
            if cancel:
                task.cancel()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert most <= 10
        assert served == found.count(None) >= sum(not cancel for *_, cancel in works)
        async with limit.holding(10):  # no bytes are held now
            pass

    asyncio.run(main())
