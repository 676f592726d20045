"""HTTP servers that fail, hang, cut and answer garbage: what is tried again, and what is said."""

import email.utils
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from guided_decode.search.http import Endpoints
from guided_decode.search.http_access import api_key_of
from guided_decode.search.http_failures import (
    EndpointError,
    Failure,
    RequestRefused,
    Retry,
    check_status,
)
from tests.search.scripted_server import DROPPED, Reply, scripted

QUICK = Retry(attempts=4, first=0.01, most=0.05)
DOWN = Reply({"error": {"message": "overloaded"}}, status=503)


def echo(path, body, number):
    return {"path": path, "body": body}


def opened(*servers, **how):
    return Endpoints([server.url for server in servers], **{"retry": QUICK, **how})


def at_first(reply, times=2):
    """Fails so often, and then answers."""
    return lambda path, body, number: reply if number < times else echo(path, body, number)


def always(reply):
    return lambda path, body, number: reply


def free_url():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_answers_come_in_the_order_of_the_requests():
    def slow_first(path, body, number):
        return Reply(echo(path, body, number), wait=0.2 if body["i"] == 0 else 0.0)

    with scripted(slow_first) as (server,), opened(server) as endpoints:
        answers = endpoints.post_all("/p", [{"i": i} for i in range(20)])
        assert [each["body"]["i"] for each in answers] == list(range(20))
        assert endpoints.post_all("/p", []) == []


@pytest.mark.parametrize(
    "reply",
    [
        *(Reply({"error": "x"}, status=code) for code in (408, 409, 425, 429, 500, 502, 503, 504)),
        DROPPED,
        Reply({"a": "long enough to be cut"}, cut=5),
        Reply(b"<html>garbage"),
        Reply(b"\xff\xfe"),
        Reply([1, 2]),
        Reply(b"[" * 100_000),
        Reply(b"x", headers={"content-encoding": "gzip"}),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(reply):
    with scripted(at_first(reply)) as (server,), opened(server) as endpoints:
        assert endpoints.post("/p", {"a": 1}) == {"path": "/p", "body": {"a": 1}}
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            DOWN,
            r"http://127.0.0.1:\d+/p answered 503 \(overloaded\), the last of 4 attempts: expec",
        ),
        (DROPPED, r"/p broke off \(RemoteProtocolError: .*\), the last of 4 attempts"),
        (Reply({"a": 1}, cut=3), r"broke off \(RemoteProtocolError: .*complete"),
        (Reply(b"garbage"), r"answered what was not asked for \(.*\), the last of 4 attempts"),
        (Reply([1]), r"\(\[1\] came where an object was expected\)"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_an_error_that_names_the_server(reply, message):
    with scripted(always(reply)) as (server,), opened(server) as endpoints:
        with pytest.raises(EndpointError, match=message):
            endpoints.post_all("/p", [{}])
        assert len(server.seen) == 4


def test_a_server_that_hangs_is_given_its_time_and_no_more():
    with (
        scripted(always(Reply({}, wait=60))) as (server,),
        opened(server, timeout=0.2) as endpoints,
        pytest.raises(EndpointError, match=r"gave no answer within 0.2 s, the last of 4"),
    ):
        endpoints.post("/p", {})


def test_a_server_that_trickles_is_cut_at_the_same_limit():
    # Bytes that come one by one: no single wait is long.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def trickle():
            while not ended.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
                    try:
                        connection.sendall(head)
                        while not ended.wait(0.02):
                            connection.sendall(b" ")
                    except OSError:
                        continue

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Endpoints(url, timeout=0.3, retry=Retry(2, 0.01, 0.01)) as endpoints,
            pytest.raises(EndpointError, match="gave no answer within 0.3 s"),
        ):
            endpoints.post("/p", {})
        ended.set()


def test_no_server_is_an_error_that_says_so():
    with (
        Endpoints(free_url(), retry=QUICK) as endpoints,
        pytest.raises(EndpointError, match=r"cannot be reached \(ConnectError"),
    ):
        endpoints.post("/p", {})


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_is_refused_is_not_tried_again(code):
    reply = Reply({"error": {"message": "too\nlong"}}, status=code)
    with scripted(always(reply)) as (server,), opened(server) as endpoints:
        message = rf"{server.url}/p refused the request \({code}\): too long"
        with pytest.raises(RequestRefused, match=message):
            endpoints.post("/p", {})
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (401, "expected 200; pass the server's API key by an environment variable"),
        (403, "pass an API key that may ask this"),
        (404, "see that the URL and the model's name are the server's"),
        (501, "see that the server has been started for this task"),
        (302, "see that the URL is that of such a server"),
    ],
)
def test_a_server_that_is_another_one_is_an_error_at_once(code, message):
    reply = Reply({"detail": "no"}, status=code, headers={"location": "http://example.com"})
    with scripted(always(reply)) as (server,), opened(server) as endpoints:
        with pytest.raises(EndpointError, match=rf"answered {code} \(no\): .*{message}"):
            endpoints.post("/p", {})
        assert len(server.seen) == 1


def test_what_an_answer_says_of_all_that_would_come_is_not_tried_again():
    def read(answer, body):
        raise RequestRefused("it is rounded") if body["i"] else ValueError("garbage")

    with scripted(echo) as (server,), opened(server) as endpoints:
        with pytest.raises(RequestRefused, match="^it is rounded$") as refused:
            endpoints.post("/p", {"i": 1}, read)
        assert (refused.value.status, len(server.seen), endpoints.retries) == (None, 1, 0)
        with pytest.raises(EndpointError, match=r"\(garbage\), the last of 4 attempts"):
            endpoints.post("/p", {"i": 0}, read)
        assert (len(server.seen), endpoints.retries) == (5, 3)


def test_one_that_fails_ends_the_call_and_gives_up_the_others():
    no = Reply({"error": {"message": "no"}}, status=400)

    def stuck(path, body, number):
        return no if body["i"] == 3 else Reply({}, wait=60.0) if body["i"] < 8 else {}

    with scripted(stuck) as (server,), opened(server) as endpoints:
        with pytest.raises(RequestRefused, match=r"\(400\): no") as refused:
            endpoints.post_all("/p", [{"i": i} for i in range(8)])
        assert refused.value.status == 400
        assert endpoints.post("/p", {"i": 9}) == {}


def test_a_server_says_how_long_to_wait():
    busy = Reply({"message": "later"}, status=429, headers={"retry-after": "0.5"})
    with scripted(at_first(busy, 1)) as (server,), opened(server) as endpoints:
        begun = time.monotonic()
        endpoints.post("/p", {})
        assert time.monotonic() - begun >= 0.5


def test_an_interrupt_gives_up_what_is_under_way():
    hangs = Reply({}, wait=60)
    with (
        scripted(lambda path, body, number: hangs if number == 0 else echo(path, body, number))
        as (server,),
        opened(server) as endpoints,
    ):  # fmt: skip

        def interrupt():
            while not server.seen:
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            endpoints.post("/p", {})
        thread.join()
        assert endpoints.post("/p", {"a": 1})["body"] == {"a": 1}


def test_a_date_is_a_wait_too():
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    for text, lowest, highest in ((later, 50, 61), ("7", 7, 7), ("soon", None, None)):
        response = httpx.Response(503, headers={"retry-after": text})
        with pytest.raises(Failure) as failed:
            check_status(response, "http://host", None)
        after = failed.value.after
        assert after is None if lowest is None else lowest <= after <= highest


def test_waits_grow_and_are_spread():
    retry = Retry(first=1.0, most=10.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (5000, 10.0)):
        waits = {retry.wait(failures) for _ in range(50)}
        assert all(longest / 2 <= each <= longest for each in waits)
        assert len(waits) > 1
    assert retry.wait(1, 50.0) == 50.0
    assert retry.wait(1, 1e9) == 300.0


def test_several_servers_share_the_load():
    slow = always(Reply({}, wait=0.05))
    with scripted(slow, slow, slow) as servers, opened(*servers, concurrency=4) as endpoints:
        endpoints.post_all("/p", [{"i": i} for i in range(60)])
        counts = [len(server.seen) for server in servers]
        assert sum(counts) == 60
        assert min(counts) > 10
        assert max(server.most for server in servers) <= 4
        assert endpoints.attempts == {each.url: len(each.seen) for each in servers}


@pytest.mark.parametrize("reply", [DOWN, DROPPED, Reply(b"garbage")], ids=str)
def test_the_work_of_a_dead_server_goes_to_the_others(reply):
    with scripted(always(reply), echo) as servers, opened(*servers) as endpoints:
        answers = endpoints.post_all("/p", [{"i": i} for i in range(50)])
        assert [each["body"]["i"] for each in answers] == list(range(50))


def test_a_server_that_is_down_is_left_alone():
    patient = Retry(attempts=4, first=600.0, most=600.0)
    with (
        scripted(always(DOWN), echo) as (dead, alive),
        opened(dead, alive, retry=patient, concurrency=2) as endpoints,
    ):
        endpoints.post_all("/p", [{"i": i} for i in range(50)])
        assert len(dead.seen) <= 2
        assert len(alive.seen) == 50


def test_no_server_has_more_at_a_time_while_another_is_gone():
    slow = always(Reply({}, wait=0.02))
    with scripted(slow, slow) as (one, other):
        urls = [one.url, free_url(), other.url]
        with Endpoints(urls, concurrency=4, retry=Retry(attempts=1, first=5.0)) as endpoints:
            endpoints.post_all("/p", [{"i": i} for i in range(60)])
        assert max(one.most, other.most) <= 4
        counts = [len(one.seen), len(other.seen)]
    assert sum(counts) == 60
    assert min(counts) >= 15


def test_a_server_that_comes_back_has_work_again():
    with scripted(at_first(DOWN, 3), echo) as servers, opened(*servers) as endpoints:
        for _ in range(20):
            endpoints.post_all("/p", [{"i": i} for i in range(10)])
        assert len(servers[0].seen) > 50


def test_each_server_is_asked_where_each_has_to_answer():
    named = [lambda path, body, number, name=name: {"name": name} for name in "ab"]
    with scripted(*named) as servers, opened(*servers) as endpoints:
        assert endpoints.post_to_each("/p", {}) == [{"name": "a"}, {"name": "b"}]
        assert endpoints.get_from_each("/v1/models") == [{"name": "a"}, {"name": "b"}]
    with (
        scripted(echo, always(DOWN)) as servers,
        opened(*servers) as endpoints,
        pytest.raises(EndpointError, match=f"^{servers[1].url}/p answered 503"),
    ):
        endpoints.post_to_each("/p", {})


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", " s3cret ")
    reply = Reply({"detail": "no such key: s3cret"}, status=401)
    with scripted(always(reply)) as (server,):
        with opened(server, api_key=api_key_of("A_KEY")) as endpoints:
            with pytest.raises(EndpointError, match=r"no such key: \*\*\*") as refused:
                endpoints.post("/p", {})
            assert "s3cret" not in f"{refused.value}{endpoints!r}"
        (seen,) = server.seen
        assert {name.lower(): value for name, value in seen[2].items()}["authorization"] == (
            "Bearer s3cret"
        )


def test_a_key_that_is_none_is_refused_without_showing_it(monkeypatch):
    assert api_key_of(None) is None
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_KEY is not set: expected the server's API key in it"):
        api_key_of("NO_KEY")
    monkeypatch.setenv("ODD", "s3cret\nmore")
    with pytest.raises(ValueError, match="ODD holds what is no API key: expected printable") as odd:
        api_key_of("ODD")
    assert "s3cret" not in str(odd.value)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no URL of a server came: expected http://HOST:PORT"),
        ("127.0.0.1:8000", "'127.0.0.1:8000' is no URL of a server"),
        ("ftp://host", "'ftp://host' is no URL"),
        ("http://[::1", r"'http://\[::1' is no URL of a server \(Invalid IPv6 URL\): expected"),
        ("http://host:99999", "'http://host:99999' is no URL"),
        ("http://host/?a=1", "is no URL of a server"),
        (["http://host:1/", "http://host:1"], "http://host:1 came twice: pass each server once"),
    ],
)
def test_what_is_no_url_is_refused(urls, message):
    with pytest.raises(ValueError, match=message):
        Endpoints(urls)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/openai/v1", "https://host/openai"),
        ("https://host/openai/", "https://host/openai"),
    ],
)
def test_the_address_of_an_api_is_its_servers(given, url):
    with Endpoints(given) as endpoints:
        assert endpoints.urls == (url,)
    with pytest.raises(ValueError, match=f"{url} came twice"):
        Endpoints([given, f"{url}/v1"])


def test_a_url_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="a URL of host has a name or password in it") as refused:
        Endpoints("http://me:s3cret@host:1")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0: expected seconds above 0"),
        ({"concurrency": 0}, "concurrency=0: expected an integer of at least 1"),
        ({"retry": Retry}, None),
    ],
)
def test_limits_without_meaning_are_refused(how, message):
    if message is None:
        with pytest.raises(ValueError, match="attempts=0: expected an integer of at least 1"):
            Retry(attempts=0)
        with pytest.raises(ValueError, match="first=2.0, most=1.0: expected seconds"):
            Retry(first=2.0, most=1.0)
        return
    with pytest.raises(ValueError, match=message):
        Endpoints("http://host:1", **how)


def test_what_was_closed_answers_no_more():
    with scripted(echo) as (server,):
        endpoints = opened(server)
        endpoints.post("/p", {})
        endpoints.close()
        endpoints.close()
        with pytest.raises(RuntimeError, match="it was closed: make a new one"):
            endpoints.post("/p", {})
