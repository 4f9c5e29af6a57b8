"""Fixtures of the trainer's tests: a tokenizer of bytes, a file of rows, an HTTP server that answers what a test tells it to."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from longtrace.trainer.prepare import byte_tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "file.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(self.server.answer(self.path, None))

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.reply(self.server.answer(self.path, json.loads(raw)))

    def reply(self, what):
        if what == "hang":
            return self.server.ended.wait(20)
        if what == "die":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        status, reply = what if isinstance(what, tuple) else (200, what)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Local(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that left is no news."""


@pytest.fixture
def http():
    """http(answer) -> address. answer(path, body) gives JSON, (status, JSON or bytes), "hang" or "die"; body None = GET."""
    running = []

    def start(answer):
        server = Local(("127.0.0.1", 0), Handler)
        server.answer, server.ended = answer, threading.Event()
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.ended.set()
        server.shutdown()
        server.server_close()
