"""One URL in, its bytes or a named reason out: bounded in time, size, redirects and reach."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from email.message import Message
from email.utils import parsedate_to_datetime

from pydantic import BaseModel, ConfigDict, Field

from data_prep.addresses import AddressPolicy, PrivateAddressError, Resolver

AGENT_TOKEN = "inherclip"
AGENT = f"{AGENT_TOKEN}/0.1 (image-text data set preparation; respects X-Robots-Tag)"
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
RETRIABLE_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_KEPT_CONNECTIONS = 4  # per thread


class FetchSettings(BaseModel):
    """The bounds of a download; seconds and bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_timeout: float = Field(5.0, gt=0, description="seconds to connect")
    read_timeout: float = Field(10.0, gt=0, description="seconds between two pieces of an answer")
    total_timeout: float = Field(60.0, gt=0, description="seconds for a URL with its redirects")
    max_bytes: int = Field(20 << 20, gt=0, description="largest body in bytes")
    max_redirects: int = Field(5, ge=0, description="redirects followed")
    retries: int = Field(2, ge=0, description="further attempts after a passing fault")
    backoff: float = Field(1.0, ge=0, description="seconds before the first of them, then doubled")
    max_wait: float = Field(60.0, ge=0, description="longest Retry-After that is waited for")
    per_host: int = Field(16, ge=1, description="requests under way at once to one host")
    respect_opt_out: bool = Field(True, description="leave out what X-Robots-Tag forbids")
    allow_private: tuple[str, ...] = Field((), description="inner networks that may be reached")
    contact: str = Field("", description="address or URL added to the user agent")


class FetchError(Exception):
    """Why a URL gave no bytes.

    Attributes:
        status: Short name for the row's status, e.g. `http_404`, `timeout`, `dns`.
        detail: The particulars.
        passing: Whether another attempt may succeed.
        wait: Seconds the server asked to wait, or None.
    """

    def __init__(
        self, status: str, detail: str = "", passing: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.passing, self.wait = status, detail, passing, wait


class _Reaper(threading.Thread):
    """Cuts connections whose total time is over.

    A socket's own timeout only bounds the silence between two pieces: a server that sends one
    byte every few seconds would hold a thread for ever.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="fetch-reaper")
        self.lock = threading.Lock()
        self.watched: dict[int, tuple[float, http.client.HTTPConnection]] = {}

    def run(self) -> None:
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            with self.lock:
                for deadline, connection in self.watched.values():
                    if now > deadline and connection.sock is not None:
                        try:
                            connection.sock.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            continue  # already closed by the other side

    def watch(self, connection: http.client.HTTPConnection, deadline: float) -> None:
        with self.lock:
            self.watched[threading.get_ident()] = deadline, connection

    def release(self) -> None:
        with self.lock:
            self.watched.pop(threading.get_ident(), None)


class Fetcher:
    """Fetches URLs from many threads; connections are kept per thread and host.

    Args:
        settings: The bounds.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.resolver = Resolver(AddressPolicy(settings.allow_private))
        self.tls = ssl.create_default_context()
        self.proxies = urllib.request.getproxies()
        agent = f"{AGENT} {settings.contact}".strip()
        self.headers = {"User-Agent": agent, "Accept": "image/*,*/*;q=0.5"}
        self.reaper = _Reaper()
        self.reaper.start()
        self.local = threading.local()

    def fetch(self, url: str) -> bytes:
        """Return the body of a URL.

        Raises:
            FetchError: with the status of the row.
        """
        deadline = time.monotonic() + self.settings.total_timeout
        first = url
        for _ in range(self.settings.max_redirects + 1):
            result = self._explained(url, deadline)
            if isinstance(result, bytes):
                return result
            url = urllib.parse.urljoin(url, result)
        raise FetchError("redirects", f"more than {self.settings.max_redirects} from {first}")

    def _explained(self, url: str, deadline: float) -> bytes | str:
        """Request once; every way in which that can fail becomes a FetchError."""
        try:
            parts = urllib.parse.urlsplit(url.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise FetchError("bad_url", "neither http nor https")
            host = parts.hostname.encode("idna").decode()
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise FetchError("bad_url", str(error)) from None
        try:
            return self._request(parts, host, port, deadline)
        except FetchError:
            raise
        except PrivateAddressError as error:
            raise FetchError("private_address", str(error)) from None
        except socket.gaierror as error:
            passing = error.errno == socket.EAI_AGAIN
            raise FetchError("dns", error.strerror or "", passing) from None
        except ssl.SSLError as error:
            if time.monotonic() <= deadline:
                raise FetchError("tls", error.reason or str(error)) from None
            raise FetchError("timeout", "total time is over", True) from None
        except TimeoutError:
            raise FetchError("timeout", "no answer", True) from None
        except http.client.IncompleteRead as error:
            status = "timeout" if time.monotonic() > deadline else "truncated"
            raise FetchError(status, f"{len(error.partial)} bytes came", True) from None
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > deadline:
                raise FetchError("timeout", "total time is over", True) from None
            detail = f"{type(error).__name__} {error}"
            if isinstance(error, http.client.InvalidURL):
                raise FetchError("bad_url", detail) from None
            raise FetchError("connection", detail, True) from None

    def _request(
        self, parts: urllib.parse.SplitResult, host: str, port: int, deadline: float
    ) -> bytes | str:
        """Return the body, or where a redirect leads."""
        path = urllib.parse.quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]|")
        if parts.query:
            path += "?" + urllib.parse.quote(parts.query, safe="/%:=&?~+!$,;'@()*[]|")
        pool = self._pool()
        name = (parts.scheme, host, port)
        kept = pool.pop(name, None)
        for connection in (kept, None) if kept else (None,):
            fresh = connection is None
            connection = connection or self._connection(parts.scheme, host, port)
            self.reaper.watch(connection, deadline)
            try:
                target = path
                if parts.scheme == "http" and self._proxy("http", host):
                    target = f"http://{parts.netloc.rpartition('@')[2]}{path}"
                connection.request("GET", target, headers=self.headers)
                response = connection.getresponse()
                result = self._read(response)
            except (http.client.BadStatusLine, ConnectionError) as error:
                connection.close()
                # A kept connection may have been closed by the server meanwhile: ask anew, once.
                if fresh or time.monotonic() > deadline:
                    raise error
                continue
            except BaseException:
                connection.close()
                raise
            finally:
                self.reaper.release()
            if response.will_close or not response.isclosed():
                connection.close()
            else:
                pool[name] = connection
                while len(pool) > _KEPT_CONNECTIONS:
                    pool.popitem(last=False)[1].close()
            return result
        raise AssertionError("a fresh connection either answers or raises")

    def _pool(self) -> OrderedDict[tuple[str, str, int], http.client.HTTPConnection]:
        if not hasattr(self.local, "pool"):
            self.local.pool = OrderedDict()
        pool: OrderedDict[tuple[str, str, int], http.client.HTTPConnection] = self.local.pool
        return pool

    def _proxy(self, scheme: str, host: str) -> urllib.parse.SplitResult | None:
        """Return the proxy that the environment names for a host (`https_proxy`, `no_proxy`)."""
        proxy = self.proxies.get(scheme)
        if not proxy or urllib.request.proxy_bypass(host):
            return None
        return urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")

    def _connection(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        timeout, proxy = self.settings.connect_timeout, self._proxy(scheme, host)
        to, at = (proxy.hostname or "", proxy.port or 8080) if proxy else (host, port)
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(to, at, timeout=timeout, context=self.tls)
            if proxy:
                connection.set_tunnel(host, port)
        else:
            connection = http.client.HTTPConnection(to, at, timeout=timeout)
        if proxy:
            # The proxy resolves names itself; only addresses in the URL can be checked here.
            if host.replace(".", "").isdigit() or ":" in host:
                self.resolver.resolve(host, port)
        else:
            connection._create_connection = (  # type: ignore[attr-defined]
                lambda address, seconds, source=None: self.resolver.connect(
                    address[0], address[1], seconds
                )
            )
        connection.connect()
        connection.sock.settimeout(self.settings.read_timeout)
        return connection

    def _read(self, response: http.client.HTTPResponse) -> bytes | str:
        code, limit = response.status, self.settings.max_bytes
        if code in _REDIRECTS and response.headers.get("Location"):
            return str(response.headers["Location"])
        if code != 200:
            wait = retry_after(response.headers) if code in RETRIABLE_CODES else None
            raise FetchError(f"http_{code}", response.reason, code in RETRIABLE_CODES, wait)
        if self.settings.respect_opt_out and opted_out(response.headers):
            raise FetchError("opted_out", ", ".join(response.headers.get_all("X-Robots-Tag", [])))
        if response.length is not None:
            if response.length > limit:
                raise FetchError("too_large", f"{response.length} bytes announced")
            return response.read()
        pieces, size = [], 0
        while piece := response.read(65536):
            size += len(piece)
            if size > limit:
                raise FetchError("too_large", f"more than {limit} bytes")
            pieces.append(piece)
        return b"".join(pieces)


class FileReader:
    """Stands in for `Fetcher` where the caption list names files; reads these and nothing else."""

    def __init__(self, settings: FetchSettings) -> None:
        # Nobody has to be spared here, and a file that is not there will not come.
        self.settings = settings.model_copy(update={"per_host": 1 << 30, "retries": 0})

    def fetch(self, path: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FetchError: it is missing, unreadable or larger than the limit.
        """
        try:
            with open(path, "rb") as handle:
                data = handle.read(self.settings.max_bytes + 1)
        except FileNotFoundError:
            raise FetchError("no_file", path) from None
        except OSError as error:
            raise FetchError("unreadable", error.strerror or str(error)) from None
        if len(data) > self.settings.max_bytes:
            raise FetchError("too_large", f"more than {self.settings.max_bytes} bytes")
        return data


def opted_out(headers: Message) -> bool:
    """Tell whether X-Robots-Tag forbids the use, for everybody or for this tool by name."""
    for value in headers.get_all("X-Robots-Tag", []):
        agent, colon, rest = str(value).partition(":")
        # "unavailable_after: DATE" also has a colon; only a bare word before it is an agent.
        named = bool(colon) and agent.strip().lower() != "unavailable_after"
        if named and agent.strip().lower() not in (AGENT_TOKEN, "*"):
            continue
        directives = (rest if named else str(value)).split(",")
        if OPT_OUTS & {directive.strip().lower() for directive in directives}:
            return True
    return False


def retry_after(headers: Message) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or a date; None without."""
    value = str(headers.get("Retry-After", "")).strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
