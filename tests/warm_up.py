"""What every rank imports or builds only once it runs: done here, before ranks are forked from this process.

DeepSpeed's optimizers import all of torch's compiler, and transformers compiles a thousand patterns of names.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from PIL import Image

_LATE = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "peft.tuners.lora",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.siglip.image_processing_siglip",
    "transformers.models.clip.modeling_clip",
)

for _name in _LATE:
    with suppress(ImportError):  # an extra that is not installed, another version's layout
        importlib.import_module(_name)
Image.init()
with suppress(ImportError):
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llava")
