"""Plans on event loops: threads, errors, cancellation and memory. The plans have gates in place of chunks."""

import asyncio
import contextvars
import gc
import os
import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import zarr
from waiting import TIMEOUT, wait_until

from zarr_cae import CAECodec, CAEConfigurationError, configure
from zarr_cae.codec.plan import Put, run, run_async
from zarr_cae.networks import engine
from zarr_cae.pixels import convert


class Network:
    """Stands in for the work of a network. The test settles its future."""

    def __init__(self):
        self.future = Future()
        self.queued = threading.Event()

    def queue(self):
        self.queued.set()
        return self.future


class Store:
    async def set(self, frame):
        self.frame = frame


def start(plan, store=None):
    return asyncio.create_task(asyncio.wait_for(run_async(plan, store), TIMEOUT))


def queued(step):
    return asyncio.to_thread(step.queued.wait, TIMEOUT)


def test_a_plan_goes_on_in_threads_and_ends_at_the_store():
    first, second, threads, store = Network(), Network(), [], Store()

    def plan():
        threads.append(threading.current_thread())
        one = yield first.queue()
        threads.append(threading.current_thread())
        two = yield second.queue()
        threads.append(threading.current_thread())
        yield Put(one + two)
        threads.append(threading.current_thread())
        return "end"

    async def main():
        task = start(plan(), store)
        for step, result in ((first, 1), (second, 2)):
            await queued(step)
            step.future.set_result(result)
        return await task

    assert asyncio.run(main()) == "end"
    assert store.frame == 3
    assert all(thread.name.startswith("cae") for thread in threads)


@pytest.mark.parametrize("workers", [None, 2])
def test_plans_compute_on_as_many_threads_as_the_settings_say_now(monkeypatch, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def plan(together, threads):
        together.wait()
        threads.add(threading.get_ident())
        yield from ()

    async def main(together, threads):
        await asyncio.gather(*(run_async(plan(together, threads)) for _ in range(12)))

    for chosen in (3, 1, 3):
        count, threads = min(chosen, workers or chosen), set()
        with configure(threads=chosen), zarr.config.set({"threading.max_workers": workers}):
            asyncio.run(main(threading.Barrier(count, timeout=TIMEOUT), threads))
        assert len(threads) == count


def test_settings_that_become_wrong_while_a_plan_waits_are_an_error():
    step = Network()

    def plan():
        yield step.queue()

    async def main():
        task = start(plan())
        await queued(step)
        await asyncio.to_thread(wait_until, lambda: step.future._done_callbacks)
        with zarr.config.set({"cae.threads": 0}):
            step.future.set_result(None)
            with pytest.raises(CAEConfigurationError, match=r"cae\.threads"):
                await task

    asyncio.run(main())


def test_context_variables_reach_every_part_of_a_plan():
    variable, seen, step = contextvars.ContextVar("variable", default="unset"), [], Network()
    step.future.set_result(None)

    def plan():
        seen.append(variable.get())
        yield step.queue()
        seen.append(variable.get())

    async def main():
        variable.set("set")
        await run_async(plan())

    asyncio.run(main())
    assert seen == ["set", "set"]


@pytest.mark.parametrize("where", ["before", "network", "after"])
def test_errors_arrive(where):
    step = Network()

    def plan():
        if where == "before":
            raise ValueError(where)
        yield step.queue()
        raise ValueError(where)

    if where == "network":
        step.future.set_exception(ValueError(where))
    else:
        step.future.set_result(None)
    with pytest.raises(ValueError, match=where):
        asyncio.run(run_async(plan()))
    with pytest.raises(ValueError, match=where):
        run(plan())


def test_cancelled_task_withdraws_queued_work():
    step, after = Network(), []

    def plan():
        yield step.queue()
        after.append(True)

    async def main():
        task = start(plan())
        await queued(step)
        await asyncio.to_thread(wait_until, lambda: step.future._done_callbacks)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert step.future.cancelled()
    assert not after


def test_task_cancelled_while_its_plan_computes_queues_nothing():
    entered, gate, step = threading.Event(), threading.Event(), Network()

    def plan():
        entered.set()
        assert gate.wait(TIMEOUT)
        yield step.queue()

    async def main():
        task = start(plan())
        await asyncio.to_thread(entered.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await asyncio.to_thread(wait_until, step.future.cancelled)

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_request_withdrawn_by_the_engine_cancels_the_task():
    step = Network()
    assert step.future.cancel()

    def plan():
        yield step.queue()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run_async(plan()))


def test_results_and_errors_are_freed_without_the_garbage_collector():
    class Planes:
        pass

    made = []

    def new():
        planes = Planes()
        made.append(weakref.ref(planes))
        return planes

    def made_by_a_network():
        future = Future()
        future.set_result(new())
        return future

    def plan(error):
        kept = new()
        answer = yield made_by_a_network()
        if error:
            raise ValueError(kept, answer)
        return new(), kept, answer

    async def main():
        for error in (False, True) * 3:
            try:
                await run_async(plan(error))
            except ValueError:
                assert error

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
        wait_until(lambda: not any(reference() for reference in made))  # a thread may be about to leave
    finally:
        gc.enable()


@pytest.mark.parametrize("tile", [64, 1024])
def test_planes_of_a_read_and_a_write_are_freed_without_the_garbage_collector(photograph, pipeline, monkeypatch, tile):
    made = []

    def spied(function):
        def call(first, *rest):
            result = function(first, *rest)
            for array in (first, result):
                while array.base is not None and isinstance(array.base, np.ndarray):
                    array = array.base  # noqa: PLW2901
                made.append(weakref.ref(array))
            return result

        return call

    array = zarr.create_array(
        {}, shape=(256, 256, 3), chunks=(128, 128, 3), dtype="uint8", serializer=CAECodec(quality=1), compressors=None
    )
    data = photograph[:256, :256]
    with zarr.config.set({"cae.tile": tile, "cae.device": "cpu"}):  # GPUs take chunks, not planes
        array[:] = data
        _ = array[:]
        monkeypatch.setattr(engine, "to_planes", spied(convert.to_planes))
        monkeypatch.setattr(engine, "to_chunk", spied(convert.to_chunk))
        gc.collect()
        gc.disable()
        try:
            array[:] = data.copy()
            _ = array[:]
            del _
            assert len(made) == 2 * 2 * 4
            wait_until(lambda: all(reference() is None for reference in made))
        finally:
            gc.enable()
