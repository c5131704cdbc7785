"""Serve an archive on a free port of loopback, in a thread."""

import threading
import time
from contextlib import contextmanager


@contextmanager
def serving(folder, **options):
    """Serve a folder until the block ends. Yield the server's address."""
    from zarr_cae.serve.app import application, listen, serve

    with listen("127.0.0.1", 0) as listening:
        server = serve(application(folder, **options), listening)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
