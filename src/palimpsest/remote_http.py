"""One POST to an OpenAI-compatible server, and what its reply means: an answer or a failure.

Everything that can go wrong on the wire is a value here (`Failure`), never an exception, so that one
bad reply among thousands costs one item. The standard library is enough: replies are whole JSON
documents, and each request has its own connection, which dies with it.

What a server sends is hostile: it is size-limited, parsed as JSON and as nothing else, and its words
reach a message only through `clean`.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from palimpsest.errors import UsageError

PATH = "/chat/completions"
_CHUNK_BYTES = 65_536
_TOO_LONG = re.compile(
    r"context_length_exceeded|context (?:length|window|size)|prompt is too long|too many tokens",
    re.I,
)
_FILTERED = re.compile(
    r"content[ _-]?(?:filter|policy|management)|moderation|\bflagged\b|ResponsibleAI", re.I
)
_NO_MONEY = re.compile(r"insufficient_quota|billing|credit balance|insufficient credits", re.I)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to ask: the parts of a base URL that `parse_base_url` has checked."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        """Return the base URL; it cannot hold a password or a key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def is_private(self) -> bool:
        """Whether a key sent there cannot be read on the way: TLS, or this machine."""
        return self.scheme == "https" or self.host in {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how much: seconds to connect, of silence, per request; bytes of a reply."""

    connect_s: float
    read_s: float
    total_s: float
    reply_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer.

    Attributes:
        code: the reason as one word (`timeout`, `http_500`, `too_long` ...).
        detail: the server's or the system's words, raw: pass them through `clean`.
        retry: asking again may help.
        fatal: no item can be answered: key, address, model or account are wrong.
            Of `http_403` the caller knows better: it may concern one item.
        verdict: the server decided about this item; asking again gives the same.
        unreachable: no connection was made.
        wait_s: how long the server asks to wait (Retry-After), or None.
    """

    code: str
    detail: str = ""
    retry: bool = False
    fatal: bool = False
    verdict: bool = False
    unreachable: bool = False
    wait_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said; token counts are None when the server does not tell them.

    `verdict` says why there is no text to score (`content_filter`, `no_text`), else it is None.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    verdict: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    """A complete HTTP reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def parse_base_url(url: str) -> Address:
    """Return the address of an `http(s)://host[:port]/path`.

    Raises:
        UsageError: another scheme, a user or a query in it (a place for secrets, so the value is
            not shown), or a malformed host or port.
    """
    if not re.fullmatch(r"https?://[!-~]+", url) or {"@", "?", "#"} & set(url):
        raise UsageError(
            "base_url must read http(s)://host[:port]/path, without user, query or fragment "
            "(value not shown: it may hold a secret)"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host, port = "", None
    if not host:
        raise UsageError(f"base_url {url!r} has no valid host or port")
    path = parts.path.rstrip("/")
    if path.endswith(PATH):
        raise UsageError(f"base_url {url!r}: leave out {PATH}; it is added")
    return Address(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def post(
    address: Address,
    body: bytes,
    headers: Mapping[str, str],
    limits: Limits,
    connected: Callable[[], None],
) -> HttpReply | Failure:
    """Return the reply to one POST of `body` to `address` + `PATH`; no redirect is followed.

    `connected` is called as soon as there is a connection.
    """
    deadline = time.monotonic() + limits.total_s
    connection = _connection(address, limits, deadline)
    is_connected = False
    try:
        connection.connect()
        is_connected = True
        connected()
        connection.sock.settimeout(min(limits.read_s, max(0.001, deadline - time.monotonic())))
        connection.request("POST", address.path + PATH, body=body, headers=dict(headers))
        return _received(connection.getresponse(), limits.reply_bytes)
    except ssl.SSLCertVerificationError as error:
        return Failure(code="certificate", detail=error.verify_message, fatal=True)
    except (OSError, http.client.HTTPException) as error:
        if not is_connected:
            detail = getattr(error, "strerror", None) or str(error)
            return Failure(code="unreachable", detail=detail, retry=True, unreachable=True)
        if isinstance(error, TimeoutError):
            detail = f"after {limits.read_s:g} s of silence or {limits.total_s:g} s in all"
            return Failure(code="timeout", detail=detail, retry=True)
        detail = f"{type(error).__name__}: {error}"
        return Failure(code="connection", detail=detail, retry=True)
    finally:
        connection.close()


def read_reply(reply: HttpReply) -> Answer | Failure:
    """Return what a complete reply says: the first choice's text, or why there is none."""
    if not 200 <= reply.status < 300:
        return _refused(reply.status, _error_words(reply.body), reply.headers)
    try:
        data = json.loads(reply.body)
    except (ValueError, RecursionError):
        kind = reply.headers.get("content-type", "no content type")
        return Failure(code="bad_reply", detail=f"not JSON ({kind})", retry=True)
    if not isinstance(data, dict):
        return Failure(code="bad_reply", detail="not a JSON object", retry=True)
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        error = data.get("error")
        status = error.get("code") if isinstance(error, dict) else None
        if isinstance(status, int) and 400 <= status < 600:  # a gateway passes an error on as 200
            return _refused(status, _error_words(reply.body), reply.headers)
        return Failure(code="bad_reply", detail="no choices[0].message in it", retry=True)
    return _first_choice(choice, message, data.get("usage"))


def clean(text: str, secret: str) -> str:
    """Return a server's words for a message: one line, at most 200 characters, without the key.

    A key of fewer than four characters is taken for a dummy, as local servers use it.
    """
    if len(secret) >= 4:
        text = text.replace(secret, "[key]")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else text[:199] + "…"


def _connection(address: Address, limits: Limits, deadline: float) -> http.client.HTTPConnection:
    timeout = min(limits.connect_s, limits.total_s)
    connection = (
        http.client.HTTPSConnection(
            address.host, address.port, timeout=timeout, context=ssl.create_default_context()
        )
        if address.scheme == "https"
        else http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    )

    def respond(sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, *args, **kwargs)
        response.fp.close()
        raw = sock.makefile("rb", buffering=0)
        response.fp = io.BufferedReader(_UntilDeadline(raw, sock, limits.read_s, deadline))
        return response

    connection.response_class = respond  # type: ignore[assignment]
    return connection


class _UntilDeadline(io.RawIOBase):
    """Reads from a socket; each read may last until the deadline, or `read_s` of silence.

    A socket's own timeout starts anew with every byte, so that a server which drips one byte a
    second would hold a request for ever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, read_s: float, deadline: float):
        self._raw, self._sock, self._read_s, self._deadline = raw, sock, read_s, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(min(self._read_s, left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _received(response: http.client.HTTPResponse, max_bytes: int) -> HttpReply | Failure:
    too_big = Failure(code="reply_too_big", detail=f"more than {max_bytes:,} bytes")
    if (response.length or 0) > max_bytes:
        return too_big
    body = bytearray()
    while chunk := response.read(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            return too_big
    if response.length:
        detail = f"cut after {len(body):,} bytes, {response.length:,} to come"
        return Failure(code="connection", detail=detail, retry=True)
    headers = {name.lower(): value for name, value in response.getheaders()}
    return HttpReply(status=response.status, headers=headers, body=bytes(body))


def _refused(status: int, words: str, headers: Mapping[str, str]) -> Failure:
    """Return what an HTTP error status means: for this item, for now, or for every item."""
    code = f"http_{status}"
    if status in {400, 413, 422} and _TOO_LONG.search(words):
        return Failure(code="too_long", detail=words, verdict=True)
    if status in {400, 403, 451} and _FILTERED.search(words):
        return Failure(code="content_filter", detail=words, verdict=True)
    if 300 <= status < 400:
        target = urlsplit(headers.get("location", "")).netloc.rpartition("@")[2]
        return Failure(code=code, detail=f"a redirect to {target or 'another path'}", fatal=True)
    if status in {401, 402, 403, 404, 405} or (status == 429 and _NO_MONEY.search(words)):
        return Failure(code=code, detail=words, fatal=True)
    retry = status in {408, 409, 425, 429} or status >= 500
    wait_s = _retry_after(headers.get("retry-after", "")) if retry else None
    return Failure(code=code, detail=words, retry=retry, wait_s=wait_s)


def _error_words(body: bytes) -> str:
    """Return type, code and message of an error body, in any of the shapes that servers use."""
    text = body[:_CHUNK_BYTES].decode("utf-8", errors="replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return str(error)
    inner = error.get("innererror")
    found = [error.get(key) for key in ("code", "type", "message", "detail")]
    found.append(inner.get("code") if isinstance(inner, dict) else None)
    return ": ".join(str(word) for word in found if word) or text


def _retry_after(value: str) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None when it says nothing."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


def _first_choice(choice: dict[str, Any], message: dict[str, Any], usage: Any) -> Answer | Failure:
    reason = choice.get("finish_reason")
    text = _text(message)
    if reason == "error":
        return Failure(code="bad_reply", detail="finish_reason is 'error'", retry=True)
    # An empty text is an answer, unless something kept the model from giving one: a filter, or a
    # limit that hidden reasoning used up. Neither is a refusal.
    verdicts = {"content_filter": "content_filter", "length": "no_text"}
    verdict = None if text else verdicts.get(_word(reason))
    if text is None and verdict is None:
        return Failure(code="bad_reply", detail="message.content is no text", retry=True)
    counts = usage if isinstance(usage, dict) else {}
    return Answer(
        text=text or "",
        finish_reason=_word(reason),
        verdict=verdict,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _text(message: dict[str, Any]) -> str | None:
    """Return the text of a message; a refusal that the server sends apart is text as well."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, dict) and p.get("type") == "text"]
        texts = [p["text"] for p in parts if isinstance(p.get("text"), str)]
        content = "".join(texts) if texts else None
    if content is None:
        content = message.get("refusal")
    return content if isinstance(content, str) else None


def _word(reason: Any) -> str:
    known = {"max_tokens": "length", "eos": "stop", "end_turn": "stop"}
    if isinstance(reason, str) and re.fullmatch(r"[a-z_]{1,32}", reason):
        return known.get(reason, reason)
    return "unknown"


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
    return value if is_count else None
