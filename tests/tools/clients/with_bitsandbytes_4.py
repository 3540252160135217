"""transformers with the language model's weights in the 4 bits of bitsandbytes, of the kind nf4."""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit
from protocol import work
from with_bitsandbytes import opened_in

opened = opened_in(Linear4bit, load_in_4bit=True, bnb_4bit_quant_type="nf4")

if __name__ == "__main__":
    work(opened, "bitsandbytes", "transformers", "torch")
