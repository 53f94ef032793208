"""A server of files on this machine's loopback, that may misbehave in any way."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (name → bytes, or what writes the answer); `promised` bytes in the header cut a download off."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Answer] = {}
        self.promised: int | None = None
        self.requests = 0
        self.closing = threading.Event()
        """Set at the end: what waits, waits for this."""
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        body = self.server.files.get(self.path.lstrip("/"))
        if body is None:
            self.send_error(404)
        elif isinstance(body, bytes):
            self.begin(200, ("Content-Length", str(self.server.promised or len(body))))
            self.wfile.write(body)
        else:
            try:
                body(self)
            except OSError:  # the other side had enough
                self.close_connection = True

    def begin(self, code: int, *headers: tuple[str, str]) -> None:
        """Send the head of an answer."""
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
