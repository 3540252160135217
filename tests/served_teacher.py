"""A small server in vLLM's protocol, for tests: a stock model behind a real port, and ways to misbehave.

It shares no code with what asks it: the chat template renders, the stock processor expands the image tokens,
transformers computes.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessorPil

# What a test does to an answer, or instead of one: None goes on as usual.
S = TypeVar("S", bound=Any)
Trick = Callable[["Handler", dict, int], dict | None]


class Served:
    """A model as a server has it. `trick` may change the answer; it is told which request this is."""

    def __init__(self, directory: Path, chat_template: str, *, name: str = "teacher") -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        self.processor = LlavaProcessor.from_pretrained(directory)
        # Pillow's resize, which is the one here: torchvision's rounds some pixels otherwise.
        self.processor.image_processor = SiglipImageProcessorPil.from_pretrained(directory)
        self.chat_template = chat_template
        self.names = [name]
        self.max_model_len = 2048
        self.max_logprobs = 20
        self.trick: Trick | None = None
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict) -> dict:
        images, conversation = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                for part in content:
                    if part["type"] == "image_url":
                        images.append(image_of(part["image_url"]["url"]))
                content = [{"type": "image"} if p["type"] == "image_url" else p for p in content]
            conversation.append({"role": message["role"], "content": content})
        text = self.processor.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=body["add_generation_prompt"],
        )
        inputs = self.processor(
            text=text, images=images or None, return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad(), self.lock:
            logprobs_TV = self.model(**inputs).logits[0].float().log_softmax(1)
        ids = inputs["input_ids"][0].tolist()
        count = body["prompt_logprobs"]
        said: list[dict | None] = [None]
        for place, token in enumerate(ids[1:], start=1):
            row_V = logprobs_TV[place - 1]
            values, columns = row_V.topk(count)
            entry = {str(token): {"logprob": float(row_V[token]), "rank": int((row_V >= row_V[token]).sum())}}
            for rank, (value, column) in enumerate(zip(values, columns, strict=True), start=1):
                entry[str(int(column))] = {"logprob": float(value), "rank": rank, "decoded_token": "?"}
            said.append(entry)
        return {
            "id": f"chatcmpl-{body['request_id']}",
            "model": body["model"],
            "prompt_token_ids": ids,
            "prompt_logprobs": said,
        }


def image_of(url: str) -> Image.Image:
    kind, _, data = url.partition(";base64,")
    assert kind in ("data:image/jpeg", "data:image/png")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


class Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.served.keys.append(self.headers.get("Authorization"))
        listed = [{"id": name, "max_model_len": self.served.max_model_len} for name in self.served.names]
        self.reply(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        served = self.served
        served.keys.append(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            served.asked.append(body)
            number = len(served.asked)
        if body["prompt_logprobs"] > served.max_logprobs:
            said = (
                f"Requested prompt logprobs of {body['prompt_logprobs']}, "
                f"which is greater than max allowed: {served.max_logprobs}"
            )
            return self.reply(400, {"error": {"message": said, "code": 400}})
        done = served.trick(self, body, number) if served.trick is not None else served.answer(body)
        if done is not None:
            self.reply(200, done)

    def reply(self, status: int, tree: object, **headers: str) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running(served: S, kind: type[Handler] = Handler) -> Iterator[S]:
    handler = type("BoundHandler", (kind,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that gave up is no failure of the test
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
