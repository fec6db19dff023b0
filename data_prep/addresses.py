"""Which network addresses a download may reach: none inside, unless the user named them."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterable

from data_prep.errors import UserError

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_TTL = 300.0  # seconds a looked-up name is kept


class PrivateAddressError(OSError):
    """A host that lies in a private, loopback or otherwise special network."""


class AddressPolicy:
    """Public addresses, plus the inner ones that were named.

    A URL list is written by strangers: without this, a row or a redirect could make a cluster's
    nodes ask for `http://169.254.169.254/` or a colleague's notebook server.

    Args:
        allowed: `all`, networks (`10.0.0.0/8`), addresses (`10.0.0.7`) or address and port
            (`127.0.0.1:8000`, `[::1]:8000`).
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self.rules: list[tuple[_Network, int | None]] = []
        for item in allowed:
            if item == "all":
                self.rules += [(ipaddress.ip_network(net), None) for net in ("0.0.0.0/0", "::/0")]
                continue
            match = re.fullmatch(r"\[?([0-9a-fA-F:.]+?)\]?:(\d+)", item)
            with_port = match and (item.startswith("[") or item.count(":") == 1)
            address, port = (match[1], int(match[2])) if match and with_port else (item, None)
            try:
                self.rules.append((ipaddress.ip_network(address, strict=False), port))
            except ValueError:
                raise UserError(
                    f"{item!r} is no network or address",
                    where="--allow-private",
                    todo="give `all`, a network like 10.0.0.0/8, or ADDRESS:PORT",
                ) from None

    def permits(self, address: str, port: int) -> bool:
        """Tell whether a numeric address may be connected to."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if ip.is_global and not ip.is_multicast:
            return True
        return any(
            ip.version == network.version and ip in network and rule in (None, port)
            for network, rule in self.rules
        )


class Resolver:
    """Host names to permitted addresses, remembered for some minutes; used by many threads.

    The address that was checked is the one connected to, so that a name whose answer changes
    between two questions gains nothing.
    """

    def __init__(self, policy: AddressPolicy) -> None:
        self.policy = policy
        self._known: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._lock = threading.Lock()

    def resolve(self, host: str, port: int) -> list[str]:
        """Return the permitted addresses of a host.

        Raises:
            PrivateAddressError: it has addresses, but none is permitted.
            socket.gaierror: it has none.
        """
        with self._lock:
            expiry, found = self._known.get((host, port), (0.0, []))
        if time.monotonic() >= expiry:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
            with self._lock:
                if len(self._known) > 100_000:
                    self._known.clear()
                self._known[host, port] = time.monotonic() + _TTL, found
        permitted = [address for address in found if self.policy.permits(address, port)]
        if not permitted:
            raise PrivateAddressError(f"{host} is {', '.join(found)}")
        return permitted

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """Open a connection to a host, at one of its first two permitted addresses.

        Raises:
            OSError: see `resolve`, or no connection within the time.
        """
        error: OSError | None = None
        for address in self.resolve(host, port)[:2]:
            try:
                connection = socket.create_connection((address, port), timeout)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as failure:
                error = failure
        raise error or OSError("no address")
