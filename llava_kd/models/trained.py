"""What trains: a pure function of the settings and of the names of a model's parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from transformers import LlavaForConditionalGeneration

from llava_kd.models.lora import is_adapter
from llava_kd.models.towers.layers import last_layers, read_parameters

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
TOWER = "model.vision_tower."
# Where each part stands in a stock model; the head belongs to the language model.
PREFIXES = {
    "vision_tower": (TOWER,),
    "multi_modal_projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
_WIDTH_MAP = "model.multi_modal_projector.width_map."


def trained_names(
    names: Collection[str], trainable: Iterable[str], *, tower: Collection[str] = ()
) -> frozenset[str]:
    """Which of a stock model's parameters are trained; `tower`: those of a trained tower, by its own names.

    A part with adapters is trained through them alone, a projector that the teacher lent through its width
    map. Raises ValueError for a part that there is not.
    """
    trainable = set(trainable)
    if unknown := trainable - set(PARTS):
        raise ValueError(f"no part named {sorted(unknown)}; a model has {list(PARTS)}")
    trained: set[str] = set()
    for part in trainable - {"vision_tower"}:
        own = {name for name in names if name.startswith(PREFIXES[part])}
        trained |= {name for name in own if is_adapter(name)} or own
    if any(name.startswith(_WIDTH_MAP) for name in names):
        lent = PREFIXES["multi_modal_projector"]
        trained -= {n for n in trained if n.startswith(lent) and not n.startswith(_WIDTH_MAP)}
    if "vision_tower" in trainable:
        trained |= {f"{TOWER}{name}" for name in tower}
    return frozenset(trained)


def trained_of(
    stock: LlavaForConditionalGeneration, trainable: Collection[str], tower_last_layers: int | None = None
) -> frozenset[str]:
    """The same of a loaded model, which stays as it is: of a trained tower, what its features come from.

    `tower_last_layers`: how many layers of it; None for the whole. Tied weights have all their names.
    """
    tower: frozenset[str] = frozenset()
    if "vision_tower" in trainable:
        module, config = stock.model.vision_tower, stock.config
        last = tower_last_layers
        tower = read_parameters(module, config) if last is None else last_layers(module, config, last)
    names = [name for name, _ in stock.named_parameters(remove_duplicate=False)]
    return trained_names(names, trainable, tower=tower)
