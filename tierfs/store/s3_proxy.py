"""By which proxy requests to a server go: by the same one, or by none, with both clients.

Left to themselves boto3 knows no networks in NO_PROXY ("192.168.0.0/16") and no ALL_PROXY, and both would look
for a server on this very machine by way of a proxy on another.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_SPOKEN = ("http", "https")  # to a proxy; boto3 knows no SOCKS


def proxy_of(endpoint: str) -> str | None:
    """The URL of the proxy by which this server is asked, as the environment says; None: by none."""
    parts = urlsplit(endpoint)
    proxies = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all") or ""
    proxy = named if "://" in named or not named else f"http://{named}"
    host = parts.hostname or ""
    if urlsplit(proxy).scheme not in _SPOKEN or _asked_directly(host, parts.port, proxies.get("no", "")):
        return None
    return proxy


def options_of_obstore(endpoint: str) -> dict[str, str]:
    """With none it would go by the environment itself."""
    proxy = proxy_of(endpoint)
    if proxy is not None:
        return {"proxy_url": proxy}
    if not getproxies():
        return {}
    return {"proxy_url": "http://unused.invalid", "proxy_excludes": urlsplit(endpoint).hostname or ""}


def options_of_boto(endpoint: str) -> dict[str, Any]:
    """Nothing where it can go by the environment."""
    if not getproxies():
        return {}
    proxy = proxy_of(endpoint)
    return {"proxies": {} if proxy is None else {urlsplit(endpoint).scheme: proxy}}


def _asked_directly(host: str, port: int | None, exceptions: str) -> bool:
    if host == "localhost" or proxy_bypass(f"{host}:{port}" if port and ":" not in host else host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or any(address in network for network in _networks(exceptions))


def _networks(exceptions: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found = []
    for part in exceptions.split(","):
        try:
            found.append(ipaddress.ip_network(part.strip(), strict=False))
        except ValueError:  # a name
            continue
    return found
