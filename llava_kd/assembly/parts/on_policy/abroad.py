"""Answers of the student that a server writes, in vLLM's protocol, with weights that it is given on the way.

Shape legend: N new tokens, T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from llava_kd.assembly.asking.answers import refuse_other_tokens
from llava_kd.assembly.asking.client import RefusedError, Server
from llava_kd.assembly.asking.questions import messages, pictures_of
from llava_kd.assembly.parts.on_policy.writer import Asked, Take
from llava_kd.data.batches.loader import StepRecords
from llava_kd.data.batches.model_side import Side
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.parallel.world import World

PLAIN = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server is, what it serves the student as, and how many records it is asked about at once."""

    server: Server
    model: str
    jobs: int


@dataclass
class Abroad:
    """Asks a server. `publish` gives it the student's weights as they are; all ranks call that together.

    Tokens are asked for by their own numbers: what the server read and wrote is checked, and nothing is
    tokenised a second time but answers that stand before another question. `generator` says how is written.
    """

    place: Place
    generator: Generator
    reader: Side
    records: StepRecords
    publish: Callable[[int], None]
    reload_every: int
    world: World
    _weights_of: int | None = None
    _lock: Lock = field(default_factory=Lock)
    _retokenised: int = 0

    @property
    def end_ids(self) -> Sequence[int]:
        return self.generator.end_ids

    def answer(self, asked: Sequence[Asked], step: int, take: Take) -> Mapping[str, float]:
        """As of any hand; ValueError naming the record whose answer does not come, or does not fit."""
        if self._weights_of is None or step - self._weights_of >= self.reload_every:
            self.publish(step)
            self._weights_of = step
        self._retokenised = 0
        with self.world.together(), ThreadPoolExecutor(self.place.jobs) as pool:
            numbers = self.records.numbers(step)
            try:
                # Records and pictures are read here: sources are not made for several threads.
                waiting = [
                    pool.submit(self._talk, one, self._read(numbers[one.place]), step, take) for one in asked
                ]
                for done in waiting:
                    done.result()
            except BaseException:  # Ctrl-C too waits for no answer that nobody wants any more
                self.place.server.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return {
            "own_answers_staleness": float(step - self._weights_of),
            "own_answers_retokenised": float(self._retokenised),
        }

    def _read(self, number: int) -> list[dict]:
        """The record as a server is asked about it."""
        source = self.records.source
        record = source.record(number)
        return messages(record, pictures_of(source, number, record, self.reader))

    def _talk(self, one: Asked, given: list[dict], step: int, take: Take) -> None:
        """Every turn of a talk, each behind the answers before it."""
        talk, server = one.talk, self.place.server
        first_T = talk.prompt.ids
        places = [k for k, message in enumerate(given) if message["role"] == "assistant"]
        while talk.room:
            limit = min(talk.room, self.generator.max_new_tokens)
            body = self._body(given[: places[talk.turn]], f"{step} {talk.turn} {talk.name}", limit)
            try:
                answer = server.chat(body, f"{step}.{talk.turn}.{one.place}")
                with self._lock:  # a tokenizer is not made for several threads
                    self._check_prompt(answer, talk.prompt.ids.tolist(), len(first_T), talk.num_asked)
                    ids_N = self._written(answer, limit)
                    (text,) = self.generator.decode(ids_N.unsqueeze(0))
                    take(talk, ids_N)
            except RefusedError as error:
                raise ValueError(f"record {talk.name!r}: {server.address} {server.remedied(error)}") from None
            except ValueError as error:
                whose = "" if str(error).startswith(server.address) else f"{server.address} "
                raise ValueError(f"record {talk.name!r}: {whose}{error}") from None
            given[places[talk.turn - 1]] = {"role": "assistant", "content": text}

    def _body(self, given: list[dict], name: str, limit: int) -> dict:
        writing = self.generator.writing
        drawn = hashlib.sha256(f"{writing.seed} {name}".encode("utf-8", "surrogatepass")).digest()
        return {
            "model": self.place.model,
            "messages": given,
            "max_tokens": limit,
            "temperature": writing.temperature,
            "top_p": writing.top_p,
            "seed": int.from_bytes(drawn[:4]),
            "stop_token_ids": list(self.end_ids),
            "add_generation_prompt": True,
            "return_token_ids": True,
            **PLAIN,  # else a server takes them from the directory that it was started with
        }

    def _check_prompt(self, answer: Mapping[str, object], here: list[int], first: int, last: int) -> None:
        """The prompt must be ours: the first question with what stands before it, and the last.

        Between them are the student's own answers, which the server has as text and may cut into other
        tokens; how often it did is counted.
        """
        there = answer.get("prompt_token_ids")
        if not isinstance(there, list):
            raise ValueError(
                "gave no prompt_token_ids, which are needed to check the tokens: use a server with "
                "return_token_ids, such as vLLM 0.10.2 or newer"
            )
        between = here[first:-last] if first < len(here) else []
        its = there[first:-last] if first < len(here) else []
        expected = [*here[:first], *its, *(here[-last:] if first < len(here) else [])]
        try:
            refuse_other_tokens(expected, there, self.reader.tokenizer, self.reader.image_token_id)
        except ValueError as error:
            raise ValueError(
                f"{error}; start the server with a directory of this student, which has the chat template "
                "of its training"
            ) from None
        self._retokenised += its != between

    def _written(self, answer: Mapping[str, object], limit: int) -> Tensor:
        """The tokens of the answer. ValueError for one that is not whole, and for words of no use."""
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        ids = choice.get("token_ids") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(ids, list) or not ids:
            raise ValueError(
                "gave no token_ids of an answer: use a server with return_token_ids, such as vLLM 0.10.2 "
                "or newer"
            )
        most = self.generator.num_tokens
        for token in ids:
            is_there = isinstance(token, int) and token >= 0 and (most is None or token < most)
            if not (is_there or token in self.end_ids):
                raise ValueError(
                    f"wrote token {str(token)[:40]}, but the tokenizers of student and teacher share only "
                    f"the first {most} tokens"
                )
        has_end, why = bool(set(ids) & set(self.end_ids)), choice.get("finish_reason")
        if why == "stop" and not has_end:
            raise ValueError(
                "returned an answer without its end token, so it looks like a cut answer: use a server "
                "that returns the end token, such as vLLM"
            )
        if not has_end and (why != "length" or len(ids) != limit):
            raise ValueError(
                f"cut an answer after {len(ids)} tokens ({why}) instead of {limit}: start the server with "
                "a larger --max-model-len, and read its log"
            )
        return torch.tensor(ids)
