"""A record as tokens, by the template of its source where that has one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.encoder import Encoded, Encoder


class SourceEncoders:
    """An `Encoder` for one model whose records may name one of the `others` by `Record.template`."""

    def __init__(self, encoder: Encoder, others: Mapping[str, Encoder]) -> None:
        self._encoder = encoder
        self._others = dict(others)

    def __call__(self, record: Record) -> Encoded:
        return self._of(record)(record)

    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Number of tokens of each record: exact, or an upper bound for a record that has no encoding."""
        if not self._others:
            return self._encoder.lengths(records)
        counts = [0] * len(records)
        for template in {record.template for record in records}:
            places = [i for i, record in enumerate(records) if record.template == template]
            found = self._of(records[places[0]]).lengths([records[i] for i in places])
            for i, count in zip(places, found, strict=True):
                counts[i] = count
        return counts

    def control_words(self, record: Record) -> list[str]:
        """Words of the record's text that the tokenizer would take for control tokens, each once."""
        return self._of(record).control_words(record)

    def _of(self, record: Record) -> Encoder:
        return self._encoder if record.template is None else self._others[record.template]
