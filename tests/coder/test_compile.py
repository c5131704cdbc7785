"""The compiled loops across a fork; what they compute is tested with `rans` and `latents`."""

import os
import subprocess
import sys

import pytest

FORK = """
import os, signal, threading, time
from numba.core.compiler_lock import global_compiler_lock
from zarr_cae.coder import compile as kernels

held = threading.Event()

def compile_something():
    with kernels._compiling, global_compiler_lock:
        held.set()
        time.sleep(0.5)

thread = threading.Thread(target=compile_something)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for a lock that nobody holds waits for ever
    kernels.decoders()
    os._exit(0)
thread.join()
_, status = os.waitpid(child, 0)
assert status == 0, status
kernels.decoders()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_while_another_thread_compiles():
    """Its child finds neither this package's lock held, nor numba's."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORK]
    subprocess.run(command, check=True, timeout=200)
