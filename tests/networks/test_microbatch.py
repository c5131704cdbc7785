"""The micro-batcher with a fake engine. Gates, not sleeps, decide what happens when."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import TIMEOUT, wait_until

from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.networks import microbatch
from zarr_cae.networks.microbatch import BatchStatistics, Limit, MicroBatcher


class Engine:
    """Negates integers, records its batches, and stops inside `run` while `gate` is closed."""

    def __init__(
        self, max_weight: Limit = 100, max_pending: Limit = 1000, lanes: int | Callable[[Hashable], int] = 1
    ) -> None:
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.lanes: list[int] = []
        self.threads: set[int] = set()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.batcher: MicroBatcher[Any, Any] = MicroBatcher(
            self.run, name="fake engine", max_weight=max_weight, max_pending=max_pending, lanes=lanes
        )

    def run(self, key: Hashable, requests: list[Any], lanes: int = 1) -> list[Any]:
        if key == "together":
            entered, queued = requests[0]
            entered.set()
            assert queued.wait(TIMEOUT)
            return [None]
        self.batches.append((key, list(requests)))
        self.lanes.append(lanes)
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        return [-request for request in requests]

    def hold(self) -> Future[Any]:
        """Make the worker busy with a request of its own until `gate` is set."""
        self.gate.clear()
        future = self.batcher.submit("hold", 0)
        assert self.entered.acquire(timeout=TIMEOUT)
        return future

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let no worker take a request of this block before all are queued: another request fills the lanes."""
        entered, queued = threading.Event(), threading.Event()
        first = self.batcher.submit("together", (entered, queued))
        assert entered.wait(TIMEOUT)
        try:
            yield
        finally:
            queued.set()
        first.result(TIMEOUT)

    def requests_after_hold(self) -> list[list[Any]]:
        assert self.batches[0] == ("hold", [0])
        return [requests for _, requests in self.batches[1:]]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.gate.set()
    engine.batcher.close(TIMEOUT)


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(TIMEOUT) for future in futures]


async def awaited(batcher: MicroBatcher[Any, Any], key: Hashable, request: Any, weight: int = 1) -> Any:
    """Return the result of a request of a coroutine."""
    return await asyncio.wrap_future(batcher.submit(key, request, weight))


# Batches


def test_lone_request_runs_without_company(engine: Engine) -> None:
    for request in range(5):
        assert engine.batcher.submit("key", request).result(TIMEOUT) == -request
    assert engine.batches == [("key", [request]) for request in range(5)]
    assert engine.batcher.statistics == BatchStatistics(batches=5, requests=5, pending=0)


def test_requests_gather_while_a_batch_runs(engine: Engine) -> None:
    engine.hold()
    futures = [engine.batcher.submit("key", request) for request in range(7)]
    assert engine.batcher.statistics == BatchStatistics(batches=1, requests=1, pending=7)
    engine.gate.set()
    assert results(futures) == [-request for request in range(7)]
    assert engine.requests_after_hold() == [list(range(7))]
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_batches_have_one_key_and_the_oldest_request_goes_first(engine: Engine) -> None:
    engine.hold()
    futures = [engine.batcher.submit(key, i) for i, key in enumerate(["b", "a", "b", "c", "a"])]
    engine.gate.set()
    assert results(futures) == [0, -1, -2, -3, -4]
    assert engine.batches[1:] == [("b", [0, 2]), ("a", [1, 4]), ("c", [3])]


def test_rest_of_a_full_batch_waits_behind_older_keys() -> None:
    engine = Engine(max_weight=2)
    engine.hold()
    futures = [engine.batcher.submit(key, i) for i, key in enumerate(["a", "a", "b", "a", "b", "c"])]
    engine.gate.set()
    results(futures)
    assert engine.batches[1:] == [("a", [0, 1]), ("b", [2, 4]), ("a", [3]), ("c", [5])]


def test_weight_of_a_batch_is_bounded_and_a_heavier_request_runs_alone() -> None:
    engine = Engine(max_weight=4)
    engine.hold()
    weights = [1, 3, 2, 9, 9, 1, 1, 1, 1, 1]
    futures = [engine.batcher.submit("key", i, weight) for i, weight in enumerate(weights)]
    engine.gate.set()
    assert results(futures) == [-i for i in range(len(weights))]
    assert engine.requests_after_hold() == [[0, 1], [2], [3], [4], [5, 6, 7, 8], [9]]


def test_limits_may_change() -> None:
    limit = 1
    engine = Engine(max_weight=lambda: limit, max_pending=lambda: 100)
    engine.hold()
    limit = 3
    futures = [engine.batcher.submit("key", i) for i in range(6)]
    engine.gate.set()
    results(futures)
    assert engine.requests_after_hold() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "arguments"), [("weight", (100, 100, 0)), ("max_weight", (0, 100, 1)), ("max_pending", (100, -1, 1))]
)
def test_limits_below_one_are_refused(name: str, arguments: tuple[int, int, int]) -> None:
    max_weight, max_pending, weight = arguments
    engine = Engine(max_weight, max_pending)
    with pytest.raises(CAEConfigurationError, match=f"cae: {name} .* at least 1"):
        engine.batcher.submit("key", 1, weight)


def test_unhashable_key_is_refused_and_nothing_is_queued(engine: Engine) -> None:
    engine.hold()
    with pytest.raises(TypeError):
        engine.batcher.submit([], 1)  # type: ignore[arg-type]
    assert engine.batcher.statistics.pending == 0


def test_worker_starts_at_the_first_request_ends_when_idle_and_starts_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbatch, "IDLE_SECONDS", 0.01)
    assert not engine.batcher._workers
    assert engine.batcher.submit("key", 1).result(TIMEOUT) == -1
    wait_until(lambda: not engine.batcher._workers)
    assert engine.batcher.submit("key", 2).result(TIMEOUT) == -2


def test_unused_batcher_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "IDLE_SECONDS", 0.01)
    engine = Engine()
    batcher = weakref.ref(engine.batcher)
    assert engine.batcher.submit("key", 1).result(TIMEOUT) == -1
    (worker,) = engine.batcher._workers
    del engine
    worker.join(TIMEOUT)
    gc.collect()
    assert batcher() is None


def test_idle_worker_holds_no_request() -> None:
    class Chunk:
        pass

    batcher: MicroBatcher[Chunk, int] = MicroBatcher(
        lambda key, requests, lanes: [1] * len(requests), name="chunks", max_weight=10, max_pending=10
    )
    chunk = Chunk()
    reference = weakref.ref(chunk)
    future = batcher.submit("key", chunk)
    assert future.result(TIMEOUT) == 1
    del chunk
    wait_until(lambda: reference() is None)
    batcher.close(TIMEOUT)


@pytest.mark.parametrize("count", [1, 3])
def test_failed_request_is_freed_with_its_exception_without_the_garbage_collector(count: int) -> None:
    class Chunk:
        pass

    def run(key: Hashable, requests: list[Chunk], lanes: int) -> list[int]:
        assert gate.wait(TIMEOUT)
        raise ValueError("bad chunk")

    gate = threading.Event()
    batcher: MicroBatcher[Chunk, int] = MicroBatcher(run, name="chunks", max_weight=count, max_pending=10)
    first = batcher.submit("first", Chunk())
    wait_until(first.running)
    chunks = [Chunk() for _ in range(count)]
    references = [weakref.ref(chunk) for chunk in chunks]
    futures = [batcher.submit("key", chunk) for chunk in chunks]
    gate.set()
    assert all(isinstance(future.exception(TIMEOUT), ValueError) for future in futures)
    gc.disable()
    try:
        chunks.clear()
        futures.clear()
        wait_until(lambda: all(reference() is None for reference in references))
    finally:
        gc.enable()
    batcher.close(TIMEOUT)


# Back-pressure


def test_thread_waits_while_the_queue_is_full() -> None:
    engine = Engine(max_weight=2, max_pending=2)
    engine.hold()
    futures = [engine.batcher.submit("key", i) for i in range(2)]
    returned = threading.Event()

    def submit_more() -> Future[Any]:
        future = engine.batcher.submit("key", 2)
        returned.set()
        return future

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(submit_more)
        wait_until(lambda: engine.batcher.statistics.pending == 3)
        assert not returned.is_set()
        engine.gate.set()
        futures.append(late.result(TIMEOUT))
    assert returned.is_set()
    assert results(futures) == [0, -1, -2]


def test_waiting_thread_is_not_starved_by_later_requests() -> None:
    """A caller goes on once its own request is taken, even if the queue is still full."""
    gates = {key: threading.Event() for key in ("first", "second", "later")}

    def run(key: Hashable, requests: list[int], lanes: int) -> list[int]:
        assert gates[str(key)].wait(TIMEOUT)
        return requests

    async def submit_later() -> list[Future[int]]:
        return [batcher.submit("later", i) for i in range(5)]

    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="gated", max_weight=1, max_pending=1)
    first = batcher.submit("first", 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.submit, "second", 2, 9)
        wait_until(lambda: batcher.statistics.pending == 9)
        later = asyncio.run(submit_later())
        gates["first"].set()
        second = waiting.result(TIMEOUT)
        assert batcher.statistics.pending == 5
        assert not second.done()
    for gate in gates.values():
        gate.set()
    assert results([first, second, *later]) == [1, 2, 0, 1, 2, 3, 4]


def test_request_heavier_than_the_queue_is_accepted() -> None:
    engine = Engine(max_weight=2, max_pending=2)
    assert engine.batcher.submit("key", 1, 50).result(TIMEOUT) == -1


def test_interrupted_wait_withdraws_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(max_weight=1, max_pending=1)
    engine.hold()
    first = engine.batcher.submit("key", 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.batcher._space, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.batcher.submit("key", 2)
    engine.gate.set()
    assert first.result(TIMEOUT) == -1
    assert engine.batcher.submit("key", 3).result(TIMEOUT) == -3
    assert engine.requests_after_hold() == [[1], [3]]


def test_full_queue_does_not_block_the_event_loop() -> None:
    engine = Engine(max_weight=4, max_pending=2)
    engine.hold()

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(awaited(engine.batcher, "key", i)) for i in range(20)]
        for _ in range(100):  # another coroutine progresses, though the worker is stuck
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        assert engine.batcher.statistics.pending == 20
        direct = engine.batcher.submit("key", 20)  # in a thread with a running loop: returns
        assert not direct.done()
        engine.gate.set()
        return [*await asyncio.gather(*tasks), await asyncio.wrap_future(direct)]

    assert asyncio.run(asyncio.wait_for(main(), TIMEOUT)) == [-i for i in range(21)]
    assert [len(batch) for batch in engine.requests_after_hold()] == [4, 4, 4, 4, 4, 1]


# Submitting from the worker


def test_run_may_submit_to_its_own_full_queue() -> None:
    nested: list[Future[int]] = []

    def run(key: Hashable, requests: list[int], lanes: int) -> list[int]:
        if key == "outer":
            nested.extend(batcher.submit("inner", 10 * request + i) for request in requests for i in range(3))
        return requests

    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="nested", max_weight=1, max_pending=1)
    assert batcher.submit("outer", 4).result(TIMEOUT) == 4
    assert results(nested) == [40, 41, 42]


def test_callback_may_submit_to_the_full_queues_of_both_batchers() -> None:
    """Workers do not wait: two that waited for space in each other's queue would wait for ever."""
    engines = [Engine(max_weight=1, max_pending=1), Engine(max_weight=1, max_pending=1)]
    followers: list[Future[Any]] = []
    done = threading.Semaphore(0)

    def submit_to_both(_: Future[Any]) -> None:
        followers.extend(engine.batcher.submit("key", i) for engine in engines for i in range(5))
        done.release()

    for engine in engines:
        engine.hold().add_done_callback(submit_to_both)
    for engine in engines:
        engine.gate.set()
    for _ in engines:
        assert done.acquire(timeout=TIMEOUT)
    assert results(followers) == [0, -1, -2, -3, -4] * 4


# Errors


class Fussy(Engine):
    """Raises `errors[request]` for a batch that holds such a request."""

    errors: dict[int, BaseException]

    def run(self, key: Hashable, requests: list[Any], lanes: int = 1) -> list[Any]:
        done = super().run(key, requests, lanes)
        for request in requests:
            if request in self.errors:
                raise self.errors[request]
        return done


def fussy(errors: dict[int, BaseException]) -> tuple[Fussy, list[Future[Any]]]:
    """Return an engine and the futures of its requests 1 to 5, which were one batch."""
    engine = Fussy()
    engine.errors = errors
    engine.hold()
    futures = [engine.batcher.submit("key", i) for i in range(1, 6)]
    engine.gate.set()
    wait(futures, TIMEOUT)
    return engine, futures


def test_error_fails_only_its_own_request() -> None:
    errors: dict[int, BaseException] = {2: ValueError("two"), 4: KeyError("four")}
    engine, futures = fussy(errors)
    assert [future.exception() for future in futures] == [None, errors[2], None, errors[4], None]
    assert [futures[i].result() for i in (0, 2, 4)] == [-1, -3, -5]
    assert engine.requests_after_hold() == [[1, 2, 3, 4, 5], [1], [2], [3], [4], [5]]
    assert engine.batcher.statistics == BatchStatistics(batches=7, requests=11, pending=0)


def test_error_of_the_whole_batch_only() -> None:
    """Such as a lack of memory for many requests at once."""

    def run(key: Hashable, requests: list[int], lanes: int) -> list[int]:
        assert gate.wait(TIMEOUT)
        if len(requests) > 1:
            raise MemoryError
        return requests

    gate = threading.Event()
    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="small", max_weight=10, max_pending=10)
    futures = [batcher.submit("key", i) for i in range(6)]
    gate.set()
    assert results(futures) == list(range(6))


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_base_exception_leaves_no_request_waiting(error: BaseException) -> None:
    engine, futures = fussy({3: error})
    for future in futures:
        failure = future.exception(TIMEOUT)
        assert isinstance(failure, CAEError)
        assert str(failure).startswith("cae: fake engine was interrupted by")
        assert failure.__cause__ is error
    assert len({id(future.exception()) for future in futures}) == 5  # raised in five threads: not one object
    assert engine.batcher.submit("key", 9).result(TIMEOUT) == -9


def test_stop_iteration_reaches_a_coroutine() -> None:
    """An asyncio future refuses StopIteration."""
    engine = Fussy()
    engine.errors = {1: StopIteration()}
    with pytest.raises(CAEError, match="interrupted by StopIteration"):
        asyncio.run(asyncio.wait_for(awaited(engine.batcher, "key", 1), TIMEOUT))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_results_fails_all(count: int) -> None:
    def run(key: Hashable, requests: list[int], lanes: int) -> list[int]:
        if key == "hold":
            entered.set()
            assert gate.wait(TIMEOUT)
            return requests
        return [0] * count

    entered, gate = threading.Event(), threading.Event()
    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="miscounter", max_weight=10, max_pending=10)
    batcher.submit("hold", 0)
    assert entered.wait(TIMEOUT)
    futures = [batcher.submit("key", i) for i in range(3)]
    gate.set()
    for future in futures:
        with pytest.raises(CAEError, match=f"^cae: miscounter returned {count} results for 3 requests$"):
            future.result(TIMEOUT)


def test_dead_worker_is_replaced(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may die of any error."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.batcher, "_work_until_idle", lambda: None)
        future = engine.batcher.submit("key", 1)
        (worker,) = engine.batcher._workers
        worker.join(TIMEOUT)
    assert engine.batcher.submit("key", 2).result(TIMEOUT) == -2
    assert future.result(TIMEOUT) == -1


def test_stray_worker_leaves_the_queue_alone(engine: Engine) -> None:
    """There is one worker, even if `run` forked or the start of a thread was interrupted."""
    engine.hold()
    future = engine.batcher.submit("key", 1)
    engine.batcher._work_until_idle()
    assert engine.batcher.statistics.pending == 1
    engine.gate.set()
    assert future.result(TIMEOUT) == -1


# Cancellation and closing


def test_cancelled_requests_never_run(engine: Engine) -> None:
    running = engine.hold()
    futures = [engine.batcher.submit("key", i) for i in range(4)]
    others = [engine.batcher.submit("other", i) for i in range(2)]
    assert not running.cancel()
    assert all(future.cancel() for future in [futures[0], futures[2], *others])
    engine.gate.set()
    assert results([futures[1], futures[3]]) == [-1, -3]
    assert wait(others, TIMEOUT).not_done == set()
    assert engine.batcher.submit("key", 9).result(TIMEOUT) == -9
    assert engine.requests_after_hold() == [[1, 3], [9]]
    assert engine.batcher.statistics.pending == 0


def test_cancelled_task_withdraws_its_request(engine: Engine) -> None:
    engine.hold()

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(awaited(engine.batcher, "key", i)) for i in range(3)]
        await asyncio.sleep(0)
        assert engine.batcher.statistics.pending == 3
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        engine.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(asyncio.wait_for(main(), TIMEOUT))
    assert (first, third) == (0, -2)
    assert isinstance(second, asyncio.CancelledError)
    assert engine.requests_after_hold() == [[0, 2]]


def test_task_cancelled_while_running_spares_its_batch(engine: Engine) -> None:
    engine.gate.clear()

    async def main() -> Any:
        task = asyncio.create_task(awaited(engine.batcher, "key", 1))
        assert await asyncio.to_thread(engine.entered.acquire, timeout=TIMEOUT)
        other = engine.batcher.submit("key", 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.set()
        return await asyncio.wrap_future(other)

    assert asyncio.run(asyncio.wait_for(main(), TIMEOUT)) == -2


def test_close_cancels_queued_requests_and_finishes_running_batches() -> None:
    engine = Engine(max_pending=1)
    running = engine.hold()
    queued = engine.batcher.submit("key", 1)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(engine.batcher.submit, "key", 2)
        wait_until(lambda: engine.batcher.statistics.pending == 2)
        closing = pool.submit(engine.batcher.close)
        for future in (queued, waiting.result(TIMEOUT)):
            with pytest.raises(CancelledError):
                future.result(TIMEOUT)
        assert not closing.done()
        engine.gate.set()
        closing.result(TIMEOUT)
    assert running.result(TIMEOUT) == 0
    with pytest.raises(CAEError, match="cae: fake engine is closed"):
        engine.batcher.submit("key", 3)
    engine.batcher.close()


def test_close_on_the_worker_does_not_wait_for_itself(engine: Engine) -> None:
    closed = threading.Event()

    def close(_: Future[Any]) -> None:
        engine.batcher.close()
        closed.set()

    engine.hold().add_done_callback(close)
    engine.gate.set()
    assert closed.wait(TIMEOUT)


# Several lanes


@pytest.fixture
def three() -> Iterator[Engine]:
    """Return an engine of three lanes."""
    engine = Engine(max_weight=4, lanes=3)
    yield engine
    engine.gate.set()
    engine.batcher.close(TIMEOUT)


def entered(engine: Engine, times: int = 1) -> None:
    for _ in range(times):
        assert engine.entered.acquire(timeout=TIMEOUT)


def test_lone_request_has_all_lanes(three: Engine) -> None:
    for request in range(3):
        assert three.batcher.submit("key", request).result(TIMEOUT) == -request
    assert three.lanes == [3, 3, 3]


def test_later_requests_wait_for_lanes_that_are_in_use(three: Engine) -> None:
    three.hold()
    futures = [three.batcher.submit("key", request) for request in range(1, 8)]
    assert three.batcher.statistics.pending == 7
    three.gate.set()
    assert results(futures) == [-request for request in range(1, 8)]
    assert three.lanes[0] == 3


def test_batches_run_side_by_side_and_do_not_wait_for_each_other(three: Engine) -> None:
    """The first two of three batches are stuck, and the lane of the third goes on."""
    three.gate.set()
    gates = [threading.Event() for _ in range(2)]

    def stuck(key: Hashable, requests: list[Any], lanes: int) -> list[Any]:
        if isinstance(key, int):
            three.entered.release()
            assert gates[key].wait(TIMEOUT)
        return [(request, lanes) for request in requests]

    with three.together():
        three.batcher._run = stuck
        blocked = [three.batcher.submit(key, key) for key in range(2)]
        third = three.batcher.submit("free", 2)
    entered(three, 2)
    assert third.result(TIMEOUT) == (2, 1)
    for request in range(20):
        assert three.batcher.submit("free", request).result(TIMEOUT) == (request, 1)
    assert not any(future.done() for future in blocked)
    for gate in gates:
        gate.set()
    assert [result for result, _ in results(blocked)] == [0, 1]


def test_free_lanes_share_queued_requests(three: Engine) -> None:
    three.hold()
    futures = [three.batcher.submit("key", request) for request in range(7)]
    three.gate.set()
    results(futures)
    batches = three.requests_after_hold()
    assert sorted(sum(batches, [])) == list(range(7))  # noqa: RUF017
    assert [len(batch) for batch in batches] in ([3, 2, 2], [3, 3, 1], [3, 2, 1, 1], [3, 2, 2, 0])
    assert all(batch == sorted(batch) for batch in batches)


def test_few_requests_have_several_lanes_each() -> None:
    engine = Engine(lanes=8)
    engine.hold()
    futures = [engine.batcher.submit("key", request) for request in range(3)]
    engine.gate.set()
    results(futures)
    assert engine.lanes[0] == 8
    assert min(engine.lanes[1:]) == 2  # the first of three requests for which eight lanes wait
    engine.batcher.close(TIMEOUT)


def test_oldest_key_starts_first_on_every_lane(three: Engine) -> None:
    three.hold()
    futures = [three.batcher.submit(key, request, 4) for request, key in enumerate("abcabcabc")]
    three.gate.set()
    results(futures)
    first = [requests[0] for _, requests in three.batches[1:]]
    for place, request in enumerate(first):  # lanes that start together may be recorded in another order
        assert abs(place - request) <= 4


def test_lanes_may_depend_on_the_key() -> None:
    engine = Engine(lanes=lambda key: {"narrow": 1, "hold": 4}.get(str(key), 4))
    engine.hold()
    futures = [engine.batcher.submit(key, 1) for key in ("narrow", "wide")]
    engine.gate.set()
    results(futures)
    assert engine.lanes[engine.batches.index(("narrow", [1]))] == 1
    with pytest.raises(CAEConfigurationError, match=r"cae: lanes .* at least 1"):
        Engine(lanes=lambda _: 0).batcher.submit("key", 1)
    engine.batcher.close(TIMEOUT)


def test_error_on_one_lane_fails_only_its_own_request() -> None:
    engine = Fussy(lanes=3)
    engine.errors = {2: ValueError("two"), 4: SystemExit(4)}
    engine.hold()
    futures = [engine.batcher.submit(str(i), i) for i in range(1, 7)]
    engine.gate.set()
    wait(futures, TIMEOUT)
    failures = [future.exception() for future in futures]
    assert failures[1] is engine.errors[2]
    assert isinstance(failures[3], CAEError)
    assert [future.result() for i, future in enumerate(futures, 1) if i not in engine.errors] == [-1, -3, -5, -6]
    assert engine.batcher.submit("after", 9).result(TIMEOUT) == -9
    assert engine.lanes[-1] == 3  # none was lost with the errors
    engine.batcher.close(TIMEOUT)


def test_requests_cancelled_on_several_lanes_never_run(three: Engine) -> None:
    three.hold()
    futures = [three.batcher.submit("key", i) for i in range(20)]
    assert all(future.cancel() for future in futures[::2])
    three.gate.set()
    assert results(futures[1::2]) == [-i for i in range(1, 20, 2)]
    assert sorted(sum(three.requests_after_hold(), [])) == list(range(1, 20, 2))  # noqa: RUF017


def test_close_waits_for_every_lane(three: Engine) -> None:
    three.gate.clear()
    with three.together():
        running = [three.batcher.submit(key, key) for key in range(3)]
    entered(three, 3)
    queued = three.batcher.submit("key", 9)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(three.batcher.close)
        with pytest.raises(CancelledError):
            queued.result(TIMEOUT)
        assert not closing.done()
        three.gate.set()
        closing.result(TIMEOUT)
    assert results(running) == [0, -1, -2]
    assert not three.batcher._workers


def test_all_workers_end_when_idle(three: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "IDLE_SECONDS", 0.01)
    three.gate.clear()
    with three.together():
        running = [three.batcher.submit(key, key) for key in range(3)]
    entered(three, 3)
    assert len(three.batcher._workers) == 3
    three.gate.set()
    results(running)
    wait_until(lambda: not three.batcher._workers)
    assert three.batcher.submit("key", 5).result(TIMEOUT) == -5


def test_there_are_no_more_workers_than_lanes(three: Engine) -> None:
    three.hold()
    futures = [three.batcher.submit(i, i) for i in range(30)]
    assert len(three.batcher._workers) <= 3
    three.gate.set()
    results(futures)
    assert len(three.batcher._workers) <= 3
    assert len(three.threads) <= 3


# Many callers


@settings(max_examples=15, deadline=None)
@given(
    plan=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=60),
    max_weight=st.integers(1, 12),
    max_pending=st.integers(1, 12),
    threads=st.integers(1, 6),
    loops=st.integers(1, 3),
    lanes=st.integers(1, 4),
)
def test_every_caller_gets_its_own_result(  # noqa: C901
    plan: list[tuple[int, int]], max_weight: int, max_pending: int, threads: int, loops: int, lanes: int
) -> None:
    used, lock = 0, threading.Lock()

    @contextmanager
    def use_of(own: int) -> Iterator[None]:
        nonlocal used
        with lock:
            used += own
            assert 1 <= own <= used <= lanes
        try:
            yield
        finally:
            with lock:
                used -= own

    def run(key: Hashable, requests: list[tuple[int, int, int]], own: int) -> list[tuple[str, int]]:
        with use_of(own):
            return outcomes(key, requests)

    def outcomes(key: Hashable, requests: list[tuple[int, int, int]]) -> list[tuple[str, int]]:
        assert all(request[1] == key for request in requests)
        assert len(requests) == 1 or sum(weight for _, _, weight in requests) <= max_weight
        if len(requests) > 1 and any(number % 7 == 0 for number, _, _ in requests):
            raise ValueError("a culprit in the batch")
        if requests[0][0] % 7 == 0:
            raise ValueError(requests[0][0])
        return [("result", number) for number, _, _ in requests]

    batcher = MicroBatcher(run, name="many", max_weight=max_weight, max_pending=max_pending, lanes=lanes)
    requests = [(number, key, weight) for number, (key, weight) in enumerate(plan)]

    def in_thread(mine: list[tuple[int, int, int]]) -> list[object]:
        futures = [batcher.submit(request[1], request, request[2]) for request in mine]
        return [future.exception(TIMEOUT) or future.result() for future in futures]

    def in_loop(mine: list[tuple[int, int, int]]) -> list[object]:
        async def main() -> list[object]:
            return await asyncio.gather(
                *(awaited(batcher, request[1], request, request[2]) for request in mine), return_exceptions=True
            )

        return asyncio.run(asyncio.wait_for(main(), TIMEOUT))

    callers = [in_thread] * threads + [in_loop] * loops
    with ThreadPoolExecutor(len(callers)) as pool:
        shares = [requests[i :: len(callers)] for i in range(len(callers))]
        answers = [pool.submit(caller, share) for caller, share in zip(callers, shares, strict=True)]
        for share, answer in zip(shares, answers, strict=True):
            for (number, _, _), outcome in zip(share, answer.result(TIMEOUT), strict=True):
                if number % 7 == 0:
                    assert isinstance(outcome, ValueError)
                    assert outcome.args == (number,)
                else:
                    assert outcome == ("result", number)
    assert batcher.statistics.pending == 0
    batcher.close(TIMEOUT)


# Fork and exit


def in_forked_child(work: Callable[[], Any]) -> Any:
    """Return the value of `work()`, called in a forked child."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work()))
    with warnings.catch_warnings():  # Python 3.12 warns of forks with threads, which this tests
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        child.start()
    try:
        assert receiver.poll(TIMEOUT)
        return receiver.recv()
    finally:
        child.kill()
        child.join(TIMEOUT)
        receiver.close()
        sender.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_starts_afresh_in_every_state_of_the_parent(engine: Engine) -> None:
    running = engine.hold()
    queued = engine.batcher.submit("key", 1)
    locked, unlock = threading.Event(), threading.Event()

    def hold_lock() -> None:
        with engine.batcher._lock:
            locked.set()
            assert unlock.wait(TIMEOUT)

    def in_child() -> tuple[BatchStatistics, Any, list[Any]]:
        engine.batches.clear()
        engine.gate = threading.Event()
        engine.gate.set()
        engine.entered = threading.Semaphore(0)
        before = engine.batcher.statistics
        return before, engine.batcher.submit("child", 5).result(TIMEOUT), engine.batches

    thread = threading.Thread(target=hold_lock)
    thread.start()
    assert locked.wait(TIMEOUT)
    threading.Timer(0.2, engine.gate.set).start()  # a fork waits for the running batch
    try:
        statistics, result, batches = in_forked_child(in_child)
    finally:
        unlock.set()
        thread.join(TIMEOUT)
    assert statistics == BatchStatistics(batches=0, requests=0, pending=0)
    assert result == -5
    assert batches == [("child", [5])]
    assert results([running, queued]) == [0, -1]  # the parent is not affected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_run_may_fork() -> None:
    def run(key: Hashable, requests: list[int], lanes: int) -> list[int]:
        if key == "fork":
            return [in_forked_child(lambda: batcher.submit("plain", 3).result(TIMEOUT))]
        return requests

    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="forking", max_weight=1, max_pending=1)
    assert batcher.submit("fork", 0).result(TIMEOUT) == 3
    assert batcher.submit("plain", 4).result(TIMEOUT) == 4


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` in a fresh interpreter, without the rest of the package, whose import takes seconds."""
    prelude = f"""
        import atexit, os, sys, threading, types
        package = sys.modules["zarr_cae"] = types.ModuleType("zarr_cae")
        package.__path__ = [{str(Path(microbatch.__file__).parents[1])!r}]
        from zarr_cae.networks import microbatch
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_interpreter_exit_finishes_the_running_batch_and_cancels_the_rest() -> None:
    done = run_script("""
        entered, exiting = threading.Event(), threading.Event()

        def run(key, requests, lanes):
            entered.set()
            exiting.wait()
            os.write(1, b"ran %d\\n" % requests[0])
            return requests

        batcher = microbatch.MicroBatcher(run, name="exit", max_weight=1, max_pending=9)
        batcher.submit("key", 1)
        entered.wait()
        batcher.submit("key", 2).add_done_callback(lambda future: os.write(1, b"cancelled\\n"))
        atexit.register(exiting.set)
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["cancelled", "ran 1"]


def test_interpreter_exit_does_not_wait_for_ever() -> None:
    done = run_script("""
        microbatch.EXIT_SECONDS = 0.01
        entered = threading.Event()

        def run(key, requests, lanes):
            entered.set()
            threading.Event().wait()

        batcher = microbatch.MicroBatcher(run, name="stuck", max_weight=1, max_pending=9)
        batcher.submit("key", 1)
        entered.wait()
        batcher.submit("key", 2)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
