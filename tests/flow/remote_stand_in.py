"""An OpenAI-compatible server on 127.0.0.1 that fails as it is told to, and counts who asks what."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; an act writes the reply."""

    protocol_version = "HTTP/1.1"
    stand_in: StandIn
    body: dict[str, Any]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(raw)
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client goes away, as it should, in some tests
            self.stand_in.act_for(self)(self)

    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (sent | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class StandIn:
    """`with StandIn({"prompt": [act, act]}) as server:` - acts in turn, the last one for ever.

    A prompt without acts is answered with `re: <prompt>`. `default` replaces that.

    Attributes:
        asked: requests per prompt. bodies, headers: of every request, in order of arrival.
        released: set at the end; acts that hang wait for it.
    """

    def __init__(
        self, script: Mapping[str, Sequence[Act]] | None = None, *, default: Act | None = None
    ) -> None:
        self.script = {prompt: list(acts) for prompt, acts in (script or {}).items()}
        self.default = default or answer()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def act_for(self, handler: Handler) -> Act:
        assert handler.path == "/v1/chat/completions"
        prompt = handler.prompt()
        with self._lock:
            acts = self.script.get(prompt, [self.default])
            act = acts[min(self.asked[prompt], len(acts) - 1)]
            self.asked[prompt] += 1
            self.bodies.append(handler.body)
            self.headers.append(dict(handler.headers))
        return act


def completion(text: Any, *, finish: Any = "stop", usage: Any = (7, 3), **message: Any) -> bytes:
    """Return the body of a reply; `usage` is prompt and completion tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | message}
    data: dict[str, Any] = {"choices": [choice | {"finish_reason": finish}]}
    if isinstance(usage, tuple):
        usage = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    if usage is not None:
        data["usage"] = usage
    return json.dumps(data).encode()


def answer(text: Any = None, **kwargs: Any) -> Act:
    """Answer with a text; without one, `re: ` and the prompt."""

    def act(handler: Handler) -> None:
        handler.send(200, completion(text or f"re: {handler.prompt()}", **kwargs))

    return act


def raw(body: bytes, status: int = 200, **headers: str) -> Act:
    """Answer with these bytes; `Content_Type="text/html"` sets a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(status, body, named)


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Act:
    """Answer with an HTTP error in OpenAI's shape."""
    body = json.dumps({"error": {"message": message, "code": code, "type": "x"}}).encode()
    return raw(body, status, **headers)


def hang() -> Act:
    """Say nothing until the test ends."""
    return lambda handler: handler.stand_in.released.wait(10) and None


def cut() -> Act:
    """Promise a body and close in the middle of it."""

    def act(handler: Handler) -> None:
        body = completion("whole")
        handler.send(200, body[: len(body) // 2], {"Content-Length": str(len(body))})

    return act


def drop() -> Act:
    """Close without a word."""
    return lambda handler: None


def drip(*, header: bool) -> Act:
    """Send a byte every 20 ms for ever, of the header or of the body: never silent, never done."""

    def act(handler: Handler) -> None:
        start = b"HTTP/1.1 200 OK\r\nX-A: " if header else b"HTTP/1.1 200 OK\r\n\r\n"
        handler.wfile.write(start)
        while not handler.stand_in.released.wait(0.02):
            handler.wfile.write(b" ")

    return act
