"""Remote models against a server that fails in every way: nothing lost, nothing mis-scored."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flow.remote_stand_in import (
    Act,
    StandIn,
    answer,
    completion,
    cut,
    drip,
    drop,
    error,
    hang,
    raw,
)
from palimpsest.errors import ModelError, UsageError
from palimpsest.evaluate import RESPONSES, read_responses
from palimpsest.plugins import build_options
from palimpsest.remote import RemoteChatModel, RemoteReply, Usage
from palimpsest.remote_crew import Crew, Pace
from palimpsest.remote_http import parse_base_url
from palimpsest.remote_options import RemoteOptions, check_remote
from palimpsest.remote_respond import ERRORS, USAGE, respond_remote
from palimpsest.store import JobFolder, RunFolder
from palimpsest.types import ChatModel, Message, Sample

KEY = "sk-very-secret-0123456789"


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds


def model(url: str, time: FakeTime | None = None, **options: Any) -> RemoteChatModel:
    time = time or FakeTime()
    options = {"model": "m", "max_retries": 2} | options
    given = build_options(RemoteOptions, {"base_url": url} | options, where="remote")
    return RemoteChatModel(given, clock=time.clock, sleep=time.sleep)


def ask(chat: RemoteChatModel, *prompts: str) -> list[RemoteReply]:
    conversations = [[Message("user", p)] for p in prompts]
    return list(chat.chat(conversations, seeds=list(range(len(prompts))), max_new_tokens=16))


def ask_one(act: Act | Sequence[Act], **options: Any) -> tuple[RemoteReply, int]:
    """Return the reply to one prompt, and how often it was asked."""
    acts = act if isinstance(act, Sequence) else [act]
    with StandIn({"p": acts}) as server:
        (reply,) = ask(model(server.url, **options), "p")
    return reply, server.asked["p"]


def samples(*prompts: str) -> list[Sample]:
    return [Sample(id=f"s-{p}", task="generate", messages=(Message("user", p),)) for p in prompts]


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return RunFolder(tmp_path).job("respond", "0123456789abcdef", {})


def respond(chat: RemoteChatModel, folder: JobFolder, *prompts: str, **options: Any) -> None:
    respond_remote(
        chat,
        samples(*prompts),
        max_new_tokens=16,
        folder=folder,
        progress=options.pop("progress", lambda done, total, text: None),
        **options,
    )


def test_a_remote_model_is_a_chat_model() -> None:
    chat = model("http://127.0.0.1:9/v1", prefill=True)
    assert isinstance(chat, ChatModel)
    assert chat.supports == {"prefill", "seed"}


def test_the_request_says_what_was_asked() -> None:
    with StandIn() as server:
        chat = model(server.url, prefill=True, top_p=0.5, max_tokens_key="max_completion_tokens")
        talk = [[Message("system", "s"), Message("user", "u")]]
        list(chat.chat(talk, seeds=[5], max_new_tokens=9, prefill="Sure"))
        list(
            model(server.url, temperature=None, send_seed=False).chat(
                talk, seeds=[5], max_new_tokens=9
            )
        )
    assert server.bodies[0] == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "Sure"},
        ],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_completion_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 5,
    }
    assert server.bodies[1].keys() == {"model", "messages", "max_tokens"}
    assert "Authorization" not in server.headers[0]


QUICK = {"read_timeout_s": 0.2, "timeout_s": 0.2}
RETRYABLE: dict[str, tuple[Act, str]] = {
    "429": (error(429), "http_429"),
    "429 with Retry-After": (error(429, Retry_After="7"), "http_429"),
    "408": (error(408), "http_408"),
    "500": (error(500), "http_500"),
    "503 in HTML": (raw(b"<h1>busy</h1>", 503, Content_Type="text/html"), "http_503"),
    "hang": (hang(), "timeout"),
    "drip of the body": (drip(header=False), "timeout"),
    "drip of the header": (drip(header=True), "timeout"),
    "cut in the body": (cut(), "connection"),
    "closed at once": (drop(), "connection"),
    "garbage": (raw(b"\x00\xff{]"), "bad_reply"),
    "HTML": (raw(b"<html>login</html>", Content_Type="text/html"), "bad_reply"),
    "deep nesting": (raw(b"[" * 200_000), "bad_reply"),
    "a list": (raw(b"[]"), "bad_reply"),
    "no choices": (raw(b"{}"), "bad_reply"),
    "empty choices": (raw(b'{"choices": []}'), "bad_reply"),
    "choices of null": (raw(b'{"choices": [null]}'), "bad_reply"),
    "error passed on as 200": (raw(b'{"error": {"code": 502, "message": "up"}}'), "http_502"),
    "null content": (raw(completion(None)), "bad_reply"),
    "content of numbers": (raw(completion(17)), "bad_reply"),
    "finish_reason error": (raw(completion("half", finish="error")), "bad_reply"),
}


@pytest.mark.parametrize("case", RETRYABLE)
def test_a_passing_failure_is_asked_again_and_answered(case: str) -> None:
    act, code = RETRYABLE[case]
    reply, asked = ask_one([act, answer("fine")], **QUICK if code == "timeout" else {})
    assert (reply.text, reply.error, reply.finish_reason, asked) == ("fine", None, "stop", 2)


@pytest.mark.parametrize("case", RETRYABLE)
def test_a_lasting_failure_costs_one_item_and_says_why(case: str) -> None:
    act, code = RETRYABLE[case]
    with StandIn({"b": [act]}) as server:
        options = QUICK if code == "timeout" else {}
        a, b, c = ask(model(server.url, max_retries=1, **options), "a", "b", "c")
    assert (a.text, c.text) == ("re: a", "re: c")
    assert (b.text, b.finish_reason, b.code, b.is_answered) == ("", "error", code, False)
    assert server.asked == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("act", "code", "finish", "is_answered"),
    [
        (error(400, "bad parameter"), "http_400", "error", False),
        (error(422), "http_422", "error", False),
        (raw(b"x" * 5000), "reply_too_big", "error", False),
        (error(400, "x", "context_length_exceeded"), "too_long", "error", True),
        (raw(b'{"message": "maximum context length is 9"}', 400), "too_long", "error", True),
        (error(400, "x", "content_filter"), "content_filter", "content_filter", True),
        (error(403, "flagged by moderation"), "content_filter", "content_filter", True),
        (raw(completion(None, finish="content_filter")), "content_filter", "content_filter", True),
        (raw(completion("", finish="content_filter")), "content_filter", "content_filter", True),
        (raw(completion(None, finish="length")), "no_text", "error", True),
    ],
)
def test_a_final_failure_is_asked_once(act: Act, code: str, finish: str, is_answered: bool) -> None:
    reply, asked = ask_one(act, max_reply_bytes=4096)
    assert (reply.text, reply.code, asked) == ("", code, 1)
    assert (reply.finish_reason, reply.is_answered) == (finish, is_answered)


@pytest.mark.parametrize(
    ("body", "text", "finish"),
    [
        (completion("cut sho", finish="length"), "cut sho", "length"),
        (completion(""), "", "stop"),
        (completion("partly", finish="content_filter"), "partly", "content_filter"),
        (completion(None, refusal="I cannot."), "I cannot.", "stop"),
        (completion("\ud83d lone, whole 😀 é\u2028"), "\ud83d lone, whole 😀 é\u2028", "stop"),
        (completion([{"type": "think"}, {"type": "text", "text": "t"}]), "t", "stop"),
        (completion("t", finish=None), "t", "unknown"),
        (completion("t", finish="<b>" * 50), "t", "unknown"),
        (completion("t", finish="eos"), "t", "stop"),
    ],
)
def test_an_answer_is_taken_as_it_is(body: bytes, text: str, finish: str) -> None:
    reply, _ = ask_one(raw(body, Content_Type="text/plain"))
    assert (reply.text, reply.finish_reason, reply.error) == (text, finish, None)


def test_a_prompt_beyond_the_context_length_is_too_long_as_for_a_local_model() -> None:
    fits, _ = ask_one(answer("t", usage=(84, 3)), context_length=100)
    cut_off, _ = ask_one(answer("t", usage=(85, 3)), context_length=100)
    assert (fits.error, cut_off.error, cut_off.prompt_tokens) == (None, "too_long", 85)
    with pytest.raises(UsageError, match="no room"):
        ask(model("http://127.0.0.1:9", context_length=16), "p")


def test_replies_keep_their_order_and_are_asked_together() -> None:
    lock, waiting, most = threading.Lock(), 0, 0

    def late_for_even(handler: Any) -> None:
        # counted only until the answer is sent: after that the client may ask again at once
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        if int(handler.prompt()) % 2 == 0:
            handler.stand_in.released.wait(0.03)
        with lock:
            waiting -= 1
        answer()(handler)

    prompts = [str(n) for n in range(12)]
    with StandIn(default=late_for_even) as server:
        replies = ask(model(server.url, concurrency=4), *prompts)
    assert [r.text for r in replies] == [f"re: {p}" for p in prompts]
    assert 2 <= most <= 4


def test_the_rate_limit_spaces_requests_and_counts_retries() -> None:
    time, arrived = FakeTime(), []

    def act(handler: Any) -> None:
        arrived.append(time.now)
        (error(500) if len(arrived) == 2 else answer())(handler)

    with StandIn(default=act) as server:
        ask(model(server.url, time, requests_per_minute=30, concurrency=1, backoff_s=0.0), *"abc")
    assert [t - 1000.0 for t in arrived] == [0.0, 2.0, 4.0, 6.0]


def test_the_pace_holds_across_threads() -> None:
    time = FakeTime()
    pace, turns, lock = Pace(60, time.clock), [], threading.Lock()

    def work(index: int, stop: threading.Event) -> int:
        with lock:  # the fake clock is one for all: sleeping threads would add up
            pace.wait_turn(time.sleep, stop)
            turns.append(time.now)
        return index

    gate = threading.Event()
    gate.set()
    with Crew(work, 9, 3, gate) as crew:
        assert sorted(crew.wait()[1] for _ in range(9)) == list(range(9))
    assert [b - a for a, b in itertools.pairwise(turns)] == [1.0] * 8


def test_retry_after_is_honoured_for_all_and_jitter_is_seeded() -> None:
    def slept() -> list[float]:
        time = FakeTime()
        with StandIn({"p": [error(429, Retry_After="7"), error(500), answer()]}) as server:
            ask(model(server.url, time, backoff_s=1.0), "p")
        return time.slept

    first = slept()
    assert 7 <= first[0] <= 8
    assert 0 <= first[1] <= 2
    assert first == slept()


def test_a_retry_after_date_is_understood_and_a_long_wait_is_not_waited_for() -> None:
    for value in ("Fri, 31 Dec 2099 23:59:59 GMT", "100000"):
        reply, asked = ask_one(error(429, Retry_After=value))
        assert (reply.code, asked) == ("http_429", 1)
    for value in ("Fri, 31 Dec 1999 23:59:59 GMT", "soon", "-5", "nan"):
        reply, asked = ask_one([error(429, Retry_After=value), answer()])
        assert (reply.error, asked) == (None, 2)


def test_usage_and_cost_are_added_up() -> None:
    script = {
        "a": [error(500), answer(usage=(1000, 200))],
        "b": [answer(usage=(500, 100))],
        "c": [answer(usage=None)],
        "d": [answer(usage={"prompt_tokens": True, "completion_tokens": -1})],
        "e": [error(400)],
        "f": [raw(completion(None, finish="length", usage=(10, 16)))],
    }
    prices = {"price_per_million_input": 2.0, "price_per_million_output": 10.0}
    with StandIn(script) as server:
        chat = model(server.url, **prices)
        ask(chat, *"abcdef")
        free = model(server.url)
    assert chat.usage == Usage(
        requests=7,
        retries=1,
        answered=5,
        unmetered=2,
        prompt_tokens=1510,
        completion_tokens=316,
        cost=pytest.approx((1510 * 2.0 + 316 * 10.0) / 1e6),
    )
    assert free.usage == Usage()
    with pytest.raises(UsageError, match="neither"):
        model("http://127.0.0.1:9", price_per_million_input=1.0)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (error(401), "set PALIMPSEST_TEST_KEY"),
        (error(402), "no credit"),
        (error(403), "PALIMPSEST_TEST_KEY"),
        (error(404), "check base_url and model"),
        (error(429, "quota", "insufficient_quota"), "quota is used up"),
        (raw(b"", 302, Location="http://u:p@elsewhere.example/x"), "redirect to elsewhere.example"),
        (raw(b"", 307, Location="/v2/chat/completions"), "redirect to another path"),
    ],
)
def test_a_fault_of_the_whole_target_is_one_line(
    act: Act, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALIMPSEST_TEST_KEY", KEY)
    with StandIn(default=act) as server:
        chat = model(server.url, api_key_env="PALIMPSEST_TEST_KEY", concurrency=1)
        with pytest.raises(ModelError, match=words) as caught:
            ask(chat, *"abcdef")
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    assert "u:p" not in str(caught.value)
    assert sum(server.asked.values()) == 1


def test_an_unreachable_server_is_an_error_at_once() -> None:
    with StandIn() as server:
        url = server.url
    with pytest.raises(ModelError, match=r"unreachable.*check base_url and the network"):
        ask(model(url), *"abc")


def test_a_403_after_an_answer_concerns_one_prompt() -> None:
    with StandIn({"b": [error(403)]}) as server:
        a, b, c = ask(model(server.url, concurrency=1), *"abc")
    assert (a.error, b.code, b.is_answered, c.error) == (None, "http_403", False, None)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://h/v1", "file:///etc/passwd", "h/v1", "http://", "http://h:99999/v1"),
        *(f"https://{KEY}@h/v1", f"https://u:{KEY}@h", f"https://h/v1?key={KEY}", "http://h/a b"),
        *("https://h/v1/chat/completions", "http://h/\r\nX: y", f"http://{'h' * 70}/v1"),
    ],
)
def test_a_base_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="base_url") as caught:
        parse_base_url(url)
    assert KEY not in str(caught.value)


def test_addresses_read_as_they_were_written() -> None:
    assert str(parse_base_url("https://api.example.com/v1/")) == "https://api.example.com:443/v1"
    assert str(parse_base_url("http://[::1]:8000")) == "http://[::1]:8000"


def test_a_key_that_is_absent_or_no_key_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALIMPSEST_TEST_KEY", raising=False)
    with pytest.raises(ModelError, match="PALIMPSEST_TEST_KEY is not set"):
        model("http://127.0.0.1:9", api_key_env="PALIMPSEST_TEST_KEY")
    monkeypatch.setenv("PALIMPSEST_TEST_KEY", f"{KEY}\r\nX-Evil: 1 é")
    with pytest.raises(ModelError, match="printable ASCII") as caught:
        model("http://127.0.0.1:9", api_key_env="PALIMPSEST_TEST_KEY")
    assert KEY not in str(caught.value)
    given = RemoteOptions(base_url="http://127.0.0.1:9", model="m", api_key_env=KEY)
    with pytest.raises(UsageError, match="never the key") as misplaced:
        check_remote(given)
    assert KEY not in str(misplaced.value)


def test_the_key_is_sent_and_never_shown(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PALIMPSEST_TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    script = {
        "echo": [answer(f"your key is {KEY}!")],
        "cut": [error(400, "x" * 185 + KEY)],
        "html": [raw(f"<p>{KEY}</p>".encode(), 500)],
        "mixed": [raw(b"{}", 200, Content_Type=KEY)],
        "fatal": [error(401, f"Incorrect API key provided: {KEY}")],
    }
    with StandIn(script) as server:
        chat = model(server.url, api_key_env="PALIMPSEST_TEST_KEY", concurrency=1)
        with pytest.raises(ModelError) as unanswered:
            respond(chat, folder, "echo", "cut", "html", "mixed")
        with pytest.raises(ModelError) as fatal:
            ask(chat, "fatal")
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    shown = [repr(chat), repr(vars(chat)), caplog.text]
    shown += ["".join(traceback.format_exception(e.value)) for e in (unanswered, fatal)]
    shown += [p.read_text(errors="replace") for p in folder.path.rglob("*") if p.is_file()]
    assert not [text for text in shown if KEY[:10] in text]
    assert "your key is [key]!" in "".join(shown)


def test_a_key_over_plain_http_to_another_machine_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PALIMPSEST_TEST_KEY", KEY)
    model("http://example.com/v1", api_key_env="PALIMPSEST_TEST_KEY")
    assert "unencrypted" in caplog.text
    assert KEY not in caplog.text


def test_what_it_cannot_do_is_not_available() -> None:
    chat = model("http://127.0.0.1:9")
    with pytest.raises(UsageError, match="prefill is not available"):
        chat.chat([[Message("user", "u")]], seeds=[0], max_new_tokens=5, prefill="Sure")
    with pytest.raises(UsageError, match="one seed each"):
        chat.chat([[Message("user", "u")]], seeds=[], max_new_tokens=5)
    with pytest.raises(UsageError, match="none may be empty"):
        chat.chat([[]], seeds=[1], max_new_tokens=5)


def test_it_stops_when_nothing_is_answered_any_more() -> None:
    prompts = [str(n) for n in range(50)]
    with StandIn(default=error(500)) as server:
        with pytest.raises(ModelError, match=r"5 items in a row.*http_500"):
            ask(model(server.url, stop_after=5, concurrency=2, max_retries=0), *prompts)
        assert sum(server.asked.values()) < 20


def test_a_resumed_run_asks_only_what_has_no_answer(folder: JobFolder) -> None:
    prompts = [f"p{n}" for n in range(20)]
    script = {"p3": [error(500)] * 3 + [answer()], "p7": [error(400), answer("7")]}
    script["p9"] = [raw(completion(None, finish="content_filter"))]
    seen: list[tuple[int, int]] = []
    with StandIn(script) as server:
        chat = model(server.url, price_per_million_input=1.0, price_per_million_output=1.0)
        with pytest.raises(ModelError, match=r"2 of 20 samples got no answer \(http_"):
            respond(chat, folder, *prompts, progress=lambda d, t, _: seen.append((d, t)))
        assert folder.read_json(ERRORS)["unanswered"] == 2
        assert folder.read_json(ERRORS)["items"]["7"]["sample_id"] == "s-p7"
        first = server.asked.copy()
        respond(
            model(server.url, price_per_million_input=1.0, price_per_million_output=1.0),
            folder,
            *prompts,
        )
        respond(model(server.url), folder, *prompts)  # all is there: nothing is asked
    assert max(seen) == (18, 20)
    assert server.asked - first == {"p3": 1, "p7": 1}
    assert set(first.values()) == {1, 3}
    assert folder.read_json(ERRORS) == {"unanswered": 0, "by_reason": {}, "items": {}}
    assert folder.read_json(USAGE)["requests"] == sum(server.asked.values())
    pairs = read_responses(folder)
    texts = {s.id.removeprefix("s-"): r.text for s, r in pairs}
    assert texts == {p: f"re: {p}" for p in prompts} | {"p7": "7", "p9": None}
    assert [r.error for _, r in pairs if r.error] == ["content_filter"]
    assert [row["prompt_tokens"] for row in folder.read(RESPONSES)] == [7] * 20
    folder.finish()


def test_accepted_errors_are_stored_as_unscored(folder: JobFolder) -> None:
    with StandIn({"b": [error(500)]}) as server:
        with pytest.raises(ModelError):
            respond(model(server.url), folder, *"abc")
        respond(model(server.url), folder, *"abc", accept_errors=True)
    found = [(r.text, r.finish_reason, r.error) for _, r in read_responses(folder)]
    assert found == [("re: a", "stop", None), (None, "error", "http_500"), ("re: c", "stop", None)]
    assert server.asked == {"a": 1, "b": 6, "c": 1}


def test_a_key_revoked_in_the_middle_loses_nothing(folder: JobFolder) -> None:
    prompts = [f"p{n}" for n in range(12)]
    with StandIn({"p5": [error(401), answer()]}) as server:
        with pytest.raises(ModelError, match="http_401"):
            respond(model(server.url, concurrency=3), folder, *prompts)
        answered = {p for p, n in server.asked.items() if p != "p5"}
        respond(model(server.url), folder, *prompts)
    assert server.asked == dict.fromkeys(prompts, 1) | {"p5": 2}
    assert len(answered) >= 5
    assert [r.text for _, r in read_responses(folder)] == [f"re: {p}" for p in prompts]


def test_an_interrupt_keeps_what_was_answered(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"p{n}" for n in range(12)]
    taken = 0
    wait = Crew.wait

    def wait_until_interrupted(crew: Crew[RemoteReply]) -> tuple[int, RemoteReply]:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt
        return wait(crew)

    with StandIn() as server:
        monkeypatch.setattr(Crew, "wait", wait_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            respond(model(server.url, concurrency=2), folder, *prompts)
        monkeypatch.setattr(Crew, "wait", wait)
        respond(model(server.url), folder, *prompts)
    assert server.asked == dict.fromkeys(prompts, 1)


def test_a_chat_that_is_left_early_stops_asking() -> None:
    with StandIn() as server:
        chat = model(server.url, concurrency=2)
        talks = [[Message("user", str(n))] for n in range(200)]
        replies = chat.chat(talks, seeds=[0] * 200, max_new_tokens=5)
        assert isinstance(replies, Iterator)
        assert not server.asked
        assert next(replies).text == "re: 0"
        replies.close()  # type: ignore[attr-defined]
        server.released.wait(0.05)
        assert sum(server.asked.values()) < 150


def test_identity_leaves_out_speed_price_and_key() -> None:
    slow = RemoteOptions(base_url="http://h", model="m", concurrency=1, timeout_s=9.0)
    fast = RemoteOptions(base_url="http://h", model="m", concurrency=64, api_key_env="K")
    assert slow.identity() == fast.identity()
    assert slow.identity() != RemoteOptions(base_url="http://h", model="n").identity()
    json.dumps(slow.identity())
