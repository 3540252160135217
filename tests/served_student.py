"""A small server in vLLM's protocol that writes as a student, with weights that it is told to read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from served_teacher import Handler, image_of

from llava_kd.evaluation.generation.generate import Generator

Trick = Callable[["WritingHandler", dict, dict], dict | None]


class ServedStudent:
    """`trick` may change an answer or give none; `rpc` may answer what is no question."""

    def __init__(self, directory: Path) -> None:
        self.names, self.max_model_len = ["student"], 2048
        self.trick: Trick | None = None
        self.rpc: Callable[[WritingHandler, dict], bool] | None = None
        self.lock = threading.Lock()
        self.lock = threading.Lock()
        self.url, self.keys, self.asked = "", [], []
        self.read: list[str] = []
        self.forgot: list[str] = []
        self.load(directory)

    def load(self, directory: Path) -> None:
        self.generator = Generator.load(directory, device=torch.device("cpu"), dtype=torch.float32)

    def answer(self, body: dict) -> dict:
        images, talk = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                images += [image_of(p["image_url"]["url"]) for p in content if p["type"] == "image_url"]
                content = [{"type": "image"} if p["type"] == "image_url" else p for p in content]
            talk.append({"role": message["role"], "content": content})
        processor = self.generator.processor
        text = processor.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=body["add_generation_prompt"]
        )
        given = processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
        ends = sorted({*self.generator.end_ids, *body["stop_token_ids"]})
        object.__setattr__(self.generator, "max_new_tokens", body["max_tokens"])
        written = self.generator.greedy(given)[0].tolist()
        stop = next((k for k, token in enumerate(written) if token in ends), None)
        return {
            "id": f"chatcmpl-{body['request_id']}",
            "model": body["model"],
            "prompt_token_ids": given["input_ids"][0].tolist(),
            "choices": [
                {
                    "token_ids": written if stop is None else written[: stop + 1],
                    "finish_reason": "length" if stop is None else "stop",
                }
            ],
        }


class WritingHandler(Handler):
    served: ServedStudent

    def do_POST(self) -> None:
        served = self.served
        served.keys.append(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            with served.lock:
                served.asked.append(body)
                answer = served.answer(body)
            done = answer if served.trick is None else served.trick(self, body, answer)
            return None if done is None else self.reply(200, done)
        if served.rpc is not None and served.rpc(self, body):
            return None
        if self.path == "/collective_rpc":
            served.read.append(body["kwargs"]["weights_path"])
            served.load(Path(served.read[-1]))
            return self.reply(200, {"results": [None]})
        served.forgot.append(self.path)
        self.send_response(200)  # vLLM says nothing here
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None
