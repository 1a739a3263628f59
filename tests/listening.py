"""An HTTP server on this machine, for as long as a block runs."""

import contextlib
import threading
from http.server import ThreadingHTTPServer


@contextlib.contextmanager
def listening(handler):
    """A server whose requests `handler`, a class of BaseHTTPRequestHandler, answers; its `address` is http://…."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    # It looks every half second whether to stop, unless told otherwise.
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
