"""The loss terms, most a file each; their names are those of the settings, the log and the report."""

from collections.abc import Mapping

from llava_kd.distill.terms.attention import Attention
from llava_kd.distill.terms.cross.response_cross import ResponseCross
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.inner.exit_logits import ExitLogits, VisualExitLogits
from llava_kd.distill.terms.inner.hint import Hint, VisualHint
from llava_kd.distill.terms.inner.mi_alpha import MIAlpha, VisualMIAlpha
from llava_kd.distill.terms.inner.regions import VisualRegions
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.response_dbild import ResponseDBiLD
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.distill.terms.term import Term
from llava_kd.distill.terms.text_relation import TextRelation
from llava_kd.distill.terms.tuning.label_smoothing import LabelSmoothing
from llava_kd.distill.terms.tuning.mcmi import MCMI
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.distill.terms.visual_switch import VisualSwitch

TERMS: Mapping[str, type[Term]] = {
    "cross_entropy": CrossEntropy,
    "response_kl": ResponseKL,
    "response_cross": ResponseCross,
    "visual_kl": VisualKL,
    "relation": Relation,
    "text_relation": TextRelation,
    "response_dbild": ResponseDBiLD,
    "visual_switch": VisualSwitch,
    "attention": Attention,
    "hint": Hint,
    "visual_hint": VisualHint,
    "visual_regions": VisualRegions,
    "mi_alpha": MIAlpha,
    "visual_mi_alpha": VisualMIAlpha,
    "exit_logits": ExitLogits,
    "visual_exit_logits": VisualExitLogits,
    "label_smoothing": LabelSmoothing,
    "mcmi": MCMI,
}
