"""Requests to a server that speaks OpenAI's protocol, with patience for one that is busy or away."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0
_SHOWN = 300
_GOES_ON = "the same command goes on from what is there"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server is, and how to ask: `jobs` requests at once, each tried again `retries` times.

    `key_env` names an environment variable with the server's key, which no file and no log is told.
    """

    url: str
    model: str | None = None
    key_env: str | None = None
    jobs: int = 8
    timeout: float = 600.0
    retries: int = 6
    first_wait: float = 1.0


class RefusedError(ValueError):
    """The server answered, and will not answer otherwise when it is asked again."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"answered {status}: {said}")
        self.status, self.said = status, said


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is redirected would lose its body, and its key might reach somebody else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


class Server:
    """One server; its methods may be called from several threads."""

    def __init__(self, settings: ServerSettings) -> None:
        """ValueError for an address that is none, and for a key that is not there."""
        self.address = _address(settings.url)
        self._settings = settings
        self._headers = {"Content-Type": "application/json", **_authorisation(settings.key_env)}
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._stop = threading.Event()

    def stop(self) -> None:
        """Wait for nothing any more."""
        self._stop.set()

    def models(self) -> list[dict]:
        """What `/v1/models` lists."""
        listed = self.call("/v1/models").get("data")
        found = [m for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
        if not found:
            raise ValueError(f"{self.address}/v1/models lists no model: is it a server of OpenAI's protocol?")
        return found

    def call(self, path: str, body: Mapping[str, object] | None = None, name: str = "") -> dict:
        """The JSON object that answers; `name` makes an id of its own for each try.

        RefusedError, or ValueError where no answer came in all the tries.
        """
        settings = self._settings
        for attempt in range(settings.retries + 1):
            sent = None if body is None else dict(body)
            if sent is not None and name:
                sent["request_id"] = f"{name}-{attempt}"
            try:
                return self._once(path, sent)
            except _TryAgainError as trouble:
                wait = min(max(trouble.wait, settings.first_wait * 2**attempt), _LONGEST_WAIT)
                if attempt == settings.retries or self._stop.wait(wait):
                    times = f"{attempt + 1} time{'s' if attempt else ''}"
                    raise ValueError(
                        f"{self.address} gave no answer, asked {times}: {trouble}; {_GOES_ON}"
                    ) from None
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Mapping[str, object] | None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout) as response:
                read = response.read()
        except urllib.error.HTTPError as error:
            raise _of_status(error) from None
        except TimeoutError:
            raise _TryAgainError(f"nothing within {self._settings.timeout:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = _line(str(reason) or type(error).__name__)
            raise _TryAgainError(f"the connection failed ({said})") from None
        try:
            answer = json.loads(read)
        except ValueError:  # not JSON, or not UTF-8
            raise _TryAgainError("the answer is no whole JSON") from None
        if not isinstance(answer, dict):
            raise RefusedError(200, "something else than a JSON object")
        return answer


class _TryAgainError(Exception):
    def __init__(self, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


def _of_status(error: urllib.error.HTTPError) -> Exception:
    try:
        said = _message(error.read())
    except (http.client.HTTPException, OSError):
        said = ""
    said = said or str(error.reason)
    if error.code not in _AGAIN:
        return RefusedError(error.code, said)
    asked = (error.headers or {}).get("Retry-After", "")
    return _TryAgainError(f"it answered {error.code} ({said})", float(asked) if asked.isdecimal() else 0.0)


def _message(body: bytes) -> str:
    """Of an error in OpenAI's form, or of any other text, one line."""
    text = body.decode("utf-8", "replace")
    try:
        tree = json.loads(text)
        error = tree.get("error", tree)
        text = str(error.get("message") or error.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    return _line(text)


def _line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ValueError(
            f"--server must be an address such as http://localhost:8000; got {url.split('@')[-1]}"
        )
    if parts.username or parts.password:
        raise ValueError(
            "--server must hold no name and no password; put a key into an environment variable and name "
            "that with --server_key_env"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _authorisation(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"--server_key_env names {name}, and no such environment variable is set here")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"the environment variable {name} must hold a key: printable ASCII without blanks")
    return {"Authorization": f"Bearer {key}"}
