# pyright: reportMissingImports=false
# The optional packages of the extra `demo` are not there where the types are checked.
"""The page of the demo: a picture and a question in, the answers side by side; served without any network."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_kd.evaluation.demo.asking import Respondent, ask_all, checked, opened
from llava_kd.evaluation.demo.columns import CSS, columns

if TYPE_CHECKING:
    import gradio as gr

_LARGEST = "64mb"  # of an uploaded file
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
)
_HIDE = "footer{display:none!important}"
_Message = MutableMapping[str, Any]
_App = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Any]


def check_installed() -> None:
    """ValueError where gradio is missing; also lets it send nothing, which it reads as it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'llava_kd[demo]'") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. ValueError for an address that cannot be had."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port must be 0 to 65535, got {port}; 0 takes a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise ValueError(f"{host}:{port} cannot be opened ({why}); give another --port, 0 for any") from None
    return listening


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build(respondents: Sequence[Respondent], first: tuple[str, str] | None = None) -> gr.Blocks:
    """The page; its one function is `/ask` for programs, too. `first`: picture and question it opens with."""
    import gradio as gr

    def ask(path: str | None, question: str | None) -> str:
        try:
            if path is None:
                raise ValueError("there is no picture: add one")
            return columns(ask_all(respondents, Path(path).read_bytes(), question or ""))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def path_of(payload: Any) -> str | None:
        """Gradio's own opens the picture, which is for `ask` to judge."""
        return None if payload is None else payload.path

    with gr.Blocks(title="llava_kd demo", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                picture = gr.Image(
                    value=first[0] if first else None,
                    label="Picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=260,
                )
                picture.preprocess = path_of
            with gr.Column(scale=2, min_width=260):
                question = gr.Textbox(
                    value=first[1] if first else "",
                    label="Question",
                    placeholder="What is in the picture?",
                    lines=2,
                    max_lines=6,
                )
                button = gr.Button("Ask", variant="primary")
                gr.Markdown(
                    "Blue tokens had a high probability, orange ones less than one half; the table shows the "
                    "second choices. Red marks where the attention of an answer was."
                )
        names = ", ".join(respondent.name for respondent in respondents)
        said = columns(ask_all(respondents, Path(first[0]).read_bytes(), first[1])) if first else ""
        answers = gr.HTML(value=said, label=names)
        gr.on(
            [button.click, question.submit],
            ask,
            inputs=[picture, question],
            outputs=answers,
            api_name="ask",
            concurrency_limit=1,
        )
    return page


def serve(page: gr.Blocks, listening: socket.socket) -> None:
    """Until a signal; an interrupt then goes on up."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Menlo", "monospace"]
    )
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None),
        page,
        path="/",
        ssr_mode=False,
        max_file_size=_LARGEST,
        enable_monitoring=False,
        theme=theme,
        css=CSS + _HIDE,
    )
    # Else gradio reads any file that a request names, and not those alone that were put in.
    page.has_launched = True
    config = uvicorn.Config(_closed(app), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def demo(
    models: Sequence[str],
    *,
    host: str,
    port: int,
    max_new_tokens: int,
    first: tuple[str | None, str | None] = (None, None),
    say: Callable[[str], None],
) -> None:
    """Serve the page of these models. ValueError for what cannot be served, before a model is read.

    `first` is the picture's file and the question that the page opens with: both, or none.
    """
    from llava_kd.evaluation.demo.respondents import load, named

    named(models)
    opening = _opening(*first)
    check_installed()
    with (
        tempfile.TemporaryDirectory(prefix="llava_kd_demo_") as uploads,
        bound(host, port) as listening,
    ):
        os.environ["GRADIO_TEMP_DIR"] = uploads
        respondents = load(models, max_new_tokens=max_new_tokens)
        page = build(respondents, opening)
        shown = ", ".join(respondent.name for respondent in respondents)
        say(f"{shown}: open {address_of(listening)} (Ctrl-C stops it)")
        serve(page, listening)


def _opening(image: str | None, question: str | None) -> tuple[str, str] | None:
    if image is None and question is None:
        return None
    if image is None or question is None:
        raise ValueError("a page that opens with an answer needs both, --image and --question")
    opened(Path(image).read_bytes())
    return image, checked(question)


def _closed(app: _App) -> _App:
    """The app, whose pages may load nothing from elsewhere."""

    async def wrapped(
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        async def send_closed(message: _Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_closed if scope["type"] == "http" else send)

    return wrapped
