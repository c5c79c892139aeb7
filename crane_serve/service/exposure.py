"""Whether others reach a server, and that it then has keys."""

import ipaddress
import socket

from crane_serve.service.settings import ServeSettings


def require_keys(settings: ServeSettings) -> None:
    """Raises ValueError for a server without keys that other machines could reach, unless the settings say so."""
    if settings.has_keys or settings.insecure or is_loopback(settings.host):
        return
    raise ValueError(
        f"host {settings.host!r} can be reached from other machines, and there are no API keys: whoever reaches the "
        "server could use it and change its masks. Give keys (--api-keys-file FILE, or CRANE_USER_KEY and "
        "CRANE_ADMIN_KEY in the environment), listen on 127.0.0.1, or accept it with --insecure"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`, an address or a name; on "" it listens on all.

    Raises ValueError for a name without an address.
    """
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"host {host!r} has no address: {error.strerror}") from error
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
