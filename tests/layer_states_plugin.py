"""The term of `extra_terms.py` that reads layers of both models, as a file that `plugins` names."""

from extra_terms import LayerStates

TERMS = {"layer_states": LayerStates}
