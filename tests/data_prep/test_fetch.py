"""Reach and manners of the downloader: addresses, opt-outs, waiting."""

from __future__ import annotations

import socket
import time
from email.message import Message

import pytest

from data_prep.addresses import AddressPolicy, PrivateAddressError, Resolver
from data_prep.errors import UserError
from data_prep.fetch import Fetcher, FetchError, FetchSettings, opted_out, retry_after
from tests.data_prep.misbehaving_server import MisbehavingServer


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.20.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False),
        ("::ffff:127.0.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_only_public_addresses_are_reached(address: str, allowed: bool) -> None:
    assert AddressPolicy().permits(address, 80) == allowed


def test_named_networks_are_reached_too() -> None:
    policy = AddressPolicy(["10.0.0.0/8", "127.0.0.1:8000", "[::1]:9000"])
    assert policy.permits("10.200.1.1", 80)
    assert policy.permits("127.0.0.1", 8000)
    assert not policy.permits("127.0.0.1", 8001)
    assert policy.permits("::1", 9000)
    assert not policy.permits("::1", 80)
    assert not policy.permits("192.168.0.1", 80)
    assert AddressPolicy(["all"]).permits("192.168.0.1", 80)
    with pytest.raises(UserError, match="no network"):
        AddressPolicy(["localhost"])


def test_a_name_is_checked_by_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [("93.184.216.34", 80), ("127.0.0.1", 80)]

    def lookup(host: str, port: int, **kwargs: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", answers[host == "evil.example"])]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    resolver = Resolver(AddressPolicy())
    assert resolver.resolve("good.example", 80) == ["93.184.216.34"]
    with pytest.raises(PrivateAddressError, match=r"127\.0\.0\.1"):
        resolver.resolve("evil.example", 80)


@pytest.mark.parametrize(
    ("values", "out"),
    [
        (["noai"], True), (["noarchive, NoImageAI"], True), (["none"], True), (["all"], False),
        (["otherbot: noai"], False), (["inherclip: noai"], True), (["*: noindex"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False), (["all", "noai"], True),
        ([], False),
    ],
)  # fmt: skip
def test_opt_outs(values: list[str], out: bool) -> None:
    headers = Message()
    for value in values:
        headers["X-Robots-Tag"] = value
    assert opted_out(headers) == out


def test_retry_after_as_seconds_and_as_date() -> None:
    headers = Message()
    assert retry_after(headers) is None
    headers["Retry-After"] = "12"
    assert retry_after(headers) == 12
    headers.replace_header("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")
    assert retry_after(headers) == 0
    headers.replace_header("Retry-After", "soon")
    assert retry_after(headers) is None


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("ftp://x/y.jpg", "bad_url"), ("http://", "bad_url"), ("file:///etc/passwd", "bad_url"),
        ("http://a..b/x", "bad_url"), ("http://x:99999/", "bad_url"), ("nonsense", "bad_url"),
        ("http://127.0.0.1:1/x", "private_address"), ("http://[::1]/x", "private_address"),
        ("http://2130706433/x", "private_address"), ("http://0x7f.1/x", "private_address"),
        ("http://does-not-exist.invalid/x", "dns"),
    ],
)  # fmt: skip
def test_urls_that_lead_nowhere_good(url: str, status: str) -> None:
    with pytest.raises(FetchError) as error:
        Fetcher(FetchSettings(connect_timeout=1)).fetch(url)
    assert error.value.status == status


def test_total_time_is_kept_against_a_dripping_server(server: MisbehavingServer) -> None:
    settings = FetchSettings(
        allow_private=(f"127.0.0.1:{server.port}",), read_timeout=5, total_timeout=1
    )
    begin = time.monotonic()
    with pytest.raises(FetchError) as error:
        Fetcher(settings).fetch(f"{server.url}/drip/1")
    assert error.value.status == "timeout"
    assert time.monotonic() - begin < 2.5


def test_connections_are_kept_and_a_closed_one_is_opened_anew(server: MisbehavingServer) -> None:
    fetcher = Fetcher(FetchSettings(allow_private=(f"127.0.0.1:{server.port}",)))
    first = fetcher.fetch(f"{server.url}/ok/1")
    (connection,) = fetcher.local.pool.values()
    assert fetcher.fetch(f"{server.url}/ok/2") != first
    assert list(fetcher.local.pool.values()) == [connection]
    connection.sock.shutdown(socket.SHUT_RDWR)  # what a server does to a connection it is tired of
    assert fetcher.fetch(f"{server.url}/ok/1") == first


def test_strange_paths_are_quoted(server: MisbehavingServer) -> None:
    fetcher = Fetcher(FetchSettings(allow_private=(f"127.0.0.1:{server.port}",)))
    fetcher.fetch(f"{server.url}/ok/1/ü and %20space?q=a b#fragment")
    assert list(server.counts) == ["/ok/1/%C3%BC%20and%20%20space?q=a%20b"]


def test_a_proxy_of_the_environment_is_used(
    server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    fetcher = Fetcher(FetchSettings())
    with pytest.raises(FetchError) as error:
        fetcher.fetch("http://images.example.com/a.jpg")
    assert error.value.status == "http_404"
    assert list(server.counts) == ["http://images.example.com/a.jpg"]
    with pytest.raises(FetchError) as error:
        fetcher.fetch("http://10.0.0.1/a.jpg")
    assert error.value.status == "private_address"
