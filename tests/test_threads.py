"""The pool, the number of threads, and forks."""

import multiprocessing
import os
import threading
import time
import warnings

import pytest

from zarr_cae import configure, threads

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


@pytest.mark.parametrize(
    ("openmp", "chosen", "expected"),
    [(None, None, 8), ("3", None, 3), ("3", 2, 2), ("3", 5, 5), ("16", None, 8), (None, 16, 8), ("2,4", None, 2),
     ("many", None, 8), ("0", None, 8), ("", None, 8)],
)  # fmt: skip
def test_the_settings_or_openmp_limit_the_cores(monkeypatch, openmp, chosen, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    if openmp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    with configure(threads=chosen):
        assert threads.cores() == expected


def test_the_pool_has_as_many_threads_as_the_settings_say_now(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for count in (3, 1, 3):
        together = threading.Barrier(count, timeout=60)

        def meet(_, together=together):
            together.wait()
            return threading.get_ident()

        with configure(threads=count):
            assert len(set(threads.over_cores(meet, range(4 * count)))) == count


def test_results_come_in_the_order_of_the_items():
    with configure(threads=4):
        assert threads.over_cores(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert threads.over_cores(str, []) == []


def test_the_first_error_arrives_and_other_threads_have_ended():
    running = []

    def work(n):
        running.append(n)
        try:
            if n == 3:
                raise ValueError(n)
            time.sleep(0.001)
        finally:
            running.remove(n)

    with configure(threads=4), pytest.raises(ValueError, match="3"):
        threads.over_cores(work, range(1000))
    assert not running


def test_work_inside_work_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)), raising=False)

    def outer(n):
        return sum(threads.over_cores(lambda m: n * m, range(20)))

    with configure(threads=2):
        assert threads.over_cores(outer, range(20)) == [190 * n for n in range(20)]


def _report(queue):
    with threads.no_fork():
        queue.put(threads.over_cores(abs, [-1, -2]))


@fork
def test_a_fork_waits_for_work_that_must_not_be_cut():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    begun, go_on, order = threading.Event(), threading.Event(), []

    def work():
        with threads.no_fork():
            begun.set()
            go_on.wait(60)
            order.append("work ends")

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    child = context.Process(target=_report, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork with threads
        child.start()
    order.append("forked")
    assert queue.get(timeout=60) == [1, 2]
    child.join(60)
    worker.join(60)
    assert (order, child.exitcode) == (["work ends", "forked"], 0)


class Slow:
    begun, go_on = threading.Event(), threading.Event()

    @threads.lazy_property
    def value(self):
        self.begun.set()
        assert self.go_on.wait(60)
        return 5


def _compute_in_child(queue):
    Slow.go_on.set()
    queue.put(Slow().value)


@fork
def test_a_child_forked_while_a_property_is_computed_computes_it_too():
    worker = threading.Thread(target=lambda: Slow().value)
    worker.start()
    assert Slow.begun.wait(60)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_compute_in_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork with threads
        child.start()
    try:
        assert queue.get(timeout=60) == 5
    finally:
        child.terminate()
        Slow.go_on.set()
        worker.join(60)


def test_a_lazy_property_is_computed_once():
    slow = Slow()
    Slow.go_on.set()
    assert (slow.value, slow.__dict__["value"]) == (5, 5)
    slow.__dict__["value"] = 6
    assert slow.value == 6
