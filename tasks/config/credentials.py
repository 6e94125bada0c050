"""Keeps credentials out of everything that is printed, logged or stored: the one place that shortens URIs."""

import re

_URI = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>`]+)")
_SECRET = r"password|passwd|passphrase|pwd|token|secret|credential|signature|(?:api|access|account)[_-]?key"
# As a parameter of a query (`?sslpassword=x`) or of a connection string (`password=x host=y`).
_PARAMETER = re.compile(rf"(?i)((?:[?&;]|\b)(?:[\w.-]*(?:{_SECRET})|sig)=)([^&;\s'\"<>`)#]+)")


def without_credentials(uri: str) -> str:
    """The URI without user and password; secret parameters of its query become `***`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _PARAMETER.sub(r"\1***", uri)
    return _PARAMETER.sub(r"\1***", f"{scheme}://{_without_userinfo(rest)}")


def redact(text: str, uri: str = "") -> str:
    """The text with every URI in it as `without_credentials` writes it.

    Args:
        uri: one that may be in the text and is recognised whatever characters it has, such as spaces in a password.
    """
    if uri:
        text = text.replace(uri, without_credentials(uri))
    text = _URI.sub(lambda match: match[1] + _without_userinfo(match[2]), text)
    return _PARAMETER.sub(r"\1***", text)


def _without_userinfo(rest: str) -> str:
    """What follows the `://` of a URI, from its host on."""
    match = re.match(r"[^/?#]*", rest)
    assert match
    authority = match[0]
    if "@" in authority:
        return rest[authority.rindex("@") + 1 :]
    # A "/", "?" or "#" in a password cuts the authority short, and what looks like the port is no number.
    if "@" in rest and ":" in authority and not authority.rpartition(":")[2].isdigit():
        return rest[rest.rindex("@") + 1 :]
    return rest
