"""Compilation across a fork. The tests of `rans` and `latents` check the compiled kernels."""

import os
import subprocess
import sys

import pytest

FORK = """
import os, signal, threading, time
from numba.core.compiler_lock import global_compiler_lock
from zarr_cae.coder.compile import _compiling, decoders

held = threading.Event()

def compile_something():
    with _compiling, global_compiler_lock:
        held.set()
        time.sleep(0.5)

thread = threading.Thread(target=compile_something)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for an abandoned lock would wait for ever
    decoders()
    os._exit(0)
thread.join()
_, status = os.waitpid(child, 0)
assert status == 0, status
decoders()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_while_another_thread_compiles():
    """The child finds the locks of this package and of numba free."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORK]
    subprocess.run(command, check=True, timeout=200)
