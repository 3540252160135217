"""Requests to a server that speaks OpenAI's protocol, with patience for one that is busy or away."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0
_SHOWN = 300
_OURS = f"llava-kd-{secrets.token_hex(8)}"  # of this process's requests, so that a mixed-up answer is known


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What messages call the options of a server, and what they say of going on."""

    url: str = "--server"
    model: str = "--model"
    key: str = "--server_key_env"
    goes_on: str = "run the same command again to continue from what is stored"


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
    wording: Wording = Wording()


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
        self.address = _address(settings.url, settings.wording)
        self._settings = settings
        authorisation = _authorisation(settings.key_env, settings.wording.key)
        self._headers = {"Content-Type": "application/json", **authorisation}
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
            raise ValueError(
                f"{self.address}/v1/models lists no model; give the address of a server with the OpenAI API"
            )
        return found

    def model(self, *, longest: int, needs: str) -> str:
        """The one to ask for. ValueError where that is not clear, or where it reads fewer than `longest`.

        `needs` says why it must read so much.
        """
        name, option = self._settings.model, self._settings.wording.model
        try:
            listed = {str(model["id"]): model for model in self.models()}
        except RefusedError as error:
            raise ValueError(f"{self.address}/v1/models {self.remedied(error)}") from None
        if name is None and len(listed) == 1:
            name = next(iter(listed))
        if name is None or name not in listed:
            raise ValueError(
                f"{option} must be a model that {self.address} serves ({', '.join(listed)}); got {name}"
            )
        reads = listed[name].get("max_model_len")
        if isinstance(reads, int) and reads < longest:
            raise ValueError(
                f"{self.address} reads at most {reads} tokens with {name}, but {needs}: start the server "
                f"with --max-model-len {longest} or more"
            )
        return name

    def remedied(self, error: RefusedError, more: Sequence[tuple[bool, str]] = ()) -> str:
        """What it said, and what to do where that is known; `more` are remedies, and whether each applies."""
        said = error.said.lower()
        remedies = (
            (
                error.status in (401, 403),
                f"the server needs an API key: name its environment variable with {self.key_option}",
            ),
            *more,
            (
                "context length" in said or "max_model_len" in said,
                "start the server with a larger --max-model-len",
            ),
            ("at most" in said and "image" in said, "start the server with a larger --limit-mm-per-prompt"),
        )
        remedy = next((text for applies, text in remedies if applies), "")
        return f"{error}{'; ' if remedy else ''}{remedy}"

    @property
    def key_option(self) -> str:
        return self._settings.wording.key

    def chat(self, body: Mapping[str, object], number: object) -> dict:
        """What `/v1/chat/completions` answers to this request of ours, which has this number.

        ValueError also for the answer to another one, or of another model.
        """
        name = f"{_OURS}-{number}"
        answer = self.call("/v1/chat/completions", body, name)
        told = str(answer.get("id", ""))
        if _OURS in told and f"{name}-" not in told:
            raise ValueError(f"returned the answer to another request ({told})")
        if (other := answer.get("model", body["model"])) != body["model"]:
            raise ValueError(f"answered with the model {str(other)[:80]!r} instead of {body['model']!r}")
        return answer

    def tell(self, path: str, body: Mapping[str, object]) -> None:
        """A request of which nothing is wanted but that it was done. Errors as of `call`."""
        self._tried(path, body, "", lambda _: {})

    def call(self, path: str, body: Mapping[str, object] | None = None, name: str = "") -> dict:
        """The JSON object that answers; `name` makes an id of its own for each try.

        RefusedError, or ValueError where no answer came in all the tries.
        """
        return self._tried(path, body, name, _object)

    def _tried(
        self, path: str, body: Mapping[str, object] | None, name: str, read: Callable[[bytes], dict]
    ) -> dict:
        settings = self._settings
        for attempt in range(settings.retries + 1):
            sent = None if body is None else dict(body)
            if sent is not None and name:
                sent["request_id"] = f"{name}-{attempt}"
            try:
                return read(self._once(path, sent))
            except _TryAgainError as trouble:
                wait = min(max(trouble.wait, settings.first_wait * 2**attempt), _LONGEST_WAIT)
                if attempt == settings.retries or self._stop.wait(wait):
                    times = f"{attempt + 1} attempt{'s' if attempt else ''}"
                    raise ValueError(
                        f"{self.address} gave no answer after {times}: {trouble}; {settings.wording.goes_on}"
                    ) from None
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Mapping[str, object] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise _of_status(error) from None
        except TimeoutError:
            raise _TryAgainError(f"no response within {self._settings.timeout:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = _line(str(reason) or type(error).__name__)
            raise _TryAgainError(f"the connection failed ({said})") from None


def _object(read: bytes) -> dict:
    try:
        answer = json.loads(read)
    except ValueError:  # not JSON, or not UTF-8
        raise _TryAgainError("the response is not complete JSON") from None
    if not isinstance(answer, dict):
        raise RefusedError(200, "with something other than a JSON object")
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


def _address(url: str, wording: Wording) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ValueError(
            f"{wording.url} must be an address such as http://localhost:8000; got {url.split('@')[-1]}"
        )
    if parts.username or parts.password:
        raise ValueError(
            f"{wording.url} must not contain a user name or password; put the key into an environment "
            f"variable and name the variable with {wording.key}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _authorisation(name: str | None, option: str) -> dict[str, str]:
    if name is None:
        return {}
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(
            f"{option} names the environment variable {name}, which is not set; set it to the key"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"the environment variable {name} must hold a key of printable ASCII characters without "
            "blanks; correct it"
        )
    return {"Authorization": f"Bearer {key}"}
