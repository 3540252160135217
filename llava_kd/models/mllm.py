"""A LLaVA model as student and teacher both use it: features and ids in, final hidden states and head out.

Shape legend: B rows, T tokens, I images, N tokens of an image, E tower width, D width of the language
model, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_kd.batch import Inputs
from llava_kd.models.attention import packed as packed_attention
from llava_kd.models.attention.answers import AnswerAttention, LookedAtBy
from llava_kd.models.attention.visual import VisualMaps, Watcher, check_maps, watchable
from llava_kd.models.taps import Tap, Taps, stages_among, tapped_module
from llava_kd.models.towers.stages import STAGE
from llava_kd.models.towers.vision_tower import feature_layer, selected, tower_states, vision_config
from llava_kd.models.trained import PARTS, trained_of


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the losses read. Logits are z = `hidden_BTD @ head_VD.T (+ bias_V)`; they are never formed here.

    With a `cap` they are cap tanh(z / cap), as of some teachers; a stock LLaVA has none. A factor of logits
    is in the hidden states.
    `head_gram_DD` is `head_VD.T @ head_VD` where it is known already, as for a head that never moves.
    `attention_LINN` is how the visual tokens of each image attend to each other, in watched layers.
    `attended_IN` is how much the answers, or questions, of their record attend to each visual token, too.
    `tapped` is what went through watched modules, by the tap.
    """

    hidden_BTD: Tensor
    projected_IND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    cap: float | None = None
    head_gram_DD: Tensor | None = None
    attention_LINN: Tensor | None = None
    attended_IN: Tensor | None = None
    tapped: Mapping[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Prediction:
        """The same without a graph, as a frozen model would give it."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {name: value.detach() for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, tapped={tap: value.detach() for tap, value in self.tapped.items()}, **cut)


class MLLM(nn.Module):
    """The parts of a stock `LlavaForConditionalGeneration`, used so that logits are never formed.

    The tower is a child only where it is trained: a frozen one runs once, outside, for both models, and no
    training engine needs to know of it. `stock` stays reachable for saving and generation but is no child.
    Of a trained tower, only weights that its features come from move: all, or those of its last layers.
    A trained part with adapters is trained through them alone.
    """

    def __init__(
        self,
        stock: LlavaForConditionalGeneration,
        *,
        trainable: Iterable[str] = (),
        tower_last_layers: int | None = None,
    ) -> None:
        """`tower_last_layers`: how many layers of a trained tower; None for the whole of it."""
        super().__init__()
        self._watched: range | None = None
        self._watched_answers: range | None = None
        self._looked_at_by: LookedAtBy = "answers"
        self._taps: Taps | None = None
        self._stages: dict[Tap, int] = {}
        self._staged: tuple[Tensor, dict[Tap, Tensor]] | None = None
        self._stock = (stock,)  # in a tuple, so that nn.Module does not register it
        self.multi_modal_projector = stock.model.multi_modal_projector
        self.language_model = stock.model.language_model
        self.lm_head = stock.lm_head
        trained = trained_of(stock, trainable := tuple(trainable), tower_last_layers)
        self.train_tower = "vision_tower" in trainable
        if self.train_tower:
            self.vision_tower = stock.model.vision_tower
        stock.requires_grad_(False)
        for name in trained:
            stock.get_parameter(name).requires_grad_(True)

    def train(self, mode: bool = True) -> MLLM:
        """As of any module, but the batch statistics of a trained ConvNet tower stay as they were learned."""
        super().train(mode)
        if self.train_tower:
            for module in self.vision_tower.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @property
    def stock(self) -> LlavaForConditionalGeneration:
        return self._stock[0]

    def parts(self, names: Iterable[str] = PARTS) -> dict[str, list[nn.Module]]:
        """Modules of each named part; the head belongs to the language model."""
        model = self.stock.model
        modules = {
            "vision_tower": [model.vision_tower],
            "multi_modal_projector": [model.multi_modal_projector],
            "language_model": [model.language_model, self.stock.lm_head],
        }
        return {name: modules[name] for name in PARTS if name in set(names)}

    def image_features(self, inputs: Inputs) -> Tensor:
        """[I, N, E] features of the batch's images; no gradient where tower and pixels have none.

        A batch without images has those of one blank image where there is one, for engines wait for it;
        `forward` multiplies them by zero.
        """
        config = self.stock.config
        tower = self.stock.model.vision_tower
        pixels_ICHW = inputs.pixels_ICHW
        has_gradient = self.train_tower or pixels_ICHW.requires_grad
        if inputs.num_images == 0 and not has_gradient:
            width = vision_config(config).hidden_size
            return torch.zeros(0, 1, width, device=pixels_ICHW.device, dtype=self.stock.dtype)
        if inputs.num_images == 0:
            pixels_ICHW = pixels_ICHW.new_zeros(1, *pixels_ICHW.shape[1:]) + pixels_ICHW.sum()
        with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
            states = tower_states(tower, pixels_ICHW)
            features_INE = selected(
                states, layer=feature_layer(config), strategy=config.vision_feature_select_strategy
            )
        if self._stages:
            self._staged = (features_INE, {tap: states[number] for tap, number in self._stages.items()})
        return features_INE

    def watch_attention(self, layers: range, dtype: torch.dtype = torch.float32) -> None:
        """Let predictions show the visual attention of these decoder layers; the model computes in `dtype`.

        Raises ValueError for a model whose attention is more than its queries and keys show.
        """
        watchable(self.language_model)
        check_maps(self.language_model, layers, dtype)
        self._watched = layers

    def watch_answers(
        self, layers: range, dtype: torch.dtype = torch.float32, *, by: LookedAtBy = "answers"
    ) -> None:
        """Let predictions show what text attends to in these layers; as `watch_attention`."""
        setting = "objective.visual_kl"
        watchable(self.language_model, setting=setting)
        check_maps(self.language_model, layers, dtype, setting=setting)
        self._watched_answers, self._looked_at_by = layers, by

    def watch_taps(self, taps: Sequence[str]) -> None:
        """Let predictions hold what goes through these modules, such as `language_model.layers.12`.

        A stage of the tower is `vision_tower.hidden_states.1`; a prediction holds those that were run for its
        features, which must be the last that were made.

        Raises ValueError for a path that the model has not, for a module of the tower, which runs apart, and
        for one of the head, whose weight alone is used.
        """
        parsed = [Tap.parse(text) for text in dict.fromkeys(taps)]
        stages = stages_among(parsed)
        for tap in parsed:
            if tap in stages:
                tapped_module(self.stock, tap)
            elif tap.path.split(".")[0] in ("vision_tower", "lm_head"):
                raise ValueError(
                    f"the tap {str(tap)!r} must lie in multi_modal_projector or language_model, or be "
                    f"{STAGE}0 or another number: the tower runs apart from them, and of the head only the "
                    "weight is used"
                )
        self._stages = stages
        self._taps = Taps(self.stock, [tap for tap in parsed if tap not in stages])

    def forward(self, inputs: Inputs, features_INE: Tensor) -> Prediction:
        """Final hidden states of every position. Raises ValueError if features and placeholders differ."""
        if self._taps is None:
            return self._predict(inputs, features_INE)
        with self._taps.watch() as seen:
            prediction = self._predict(inputs, features_INE)
        seen = {**seen, **self._stages_of(features_INE)}
        return replace(prediction, tapped={str(tap): value for tap, value in seen.items()})

    def _stages_of(self, features_INE: Tensor) -> dict[Tap, Tensor]:
        """What the tower's stages were when it made these features, each [I, M, E] of its own M and E."""
        if not self._stages:
            return {}
        made, self._staged = self._staged, None
        # Engines may hand on the same numbers as another tensor, as ZeRO-3 does where a module's inputs pass.
        if made is None or made[0].data_ptr() != features_INE.data_ptr():
            raise ValueError(
                "stages of the tower belong to the features that were computed last, and these features are "
                "others: call image_features before each forward"
            )
        return made[1]

    def _predict(self, inputs: Inputs, features_INE: Tensor) -> Prediction:
        maps = None if self._watched is None else VisualMaps(self._watched, inputs)
        answers = None
        if self._watched_answers is not None:
            answers = AnswerAttention(self._watched_answers, inputs, self._looked_at_by)
        watchers = [watcher for watcher in (maps, answers) if watcher is not None]
        embedded_BTD = self.language_model.get_input_embeddings()(inputs.input_ids_BT)
        projected_IND = self.project(features_INE.to(embedded_BTD.dtype))
        prediction = self._read(inputs, embedded_BTD, projected_IND, watchers)
        if not watchers:
            return prediction
        return replace(
            prediction,
            attention_LINN=None if maps is None else maps.take(),
            attended_IN=None if answers is None else answers.take(),
        )

    def project(self, features_INE: Tensor) -> Tensor:
        """Features as the language model reads them; of one stand-in where there is no image."""
        if features_INE.shape[0] == 0:
            features_INE = features_INE.new_zeros(1, 1, features_INE.shape[2])
        return self.multi_modal_projector(features_INE)

    def read(self, inputs: Inputs, projected_IND: Tensor) -> Prediction:
        """The prediction with `projected_IND`, of whatever origin, in the places of the images."""
        embedded_BTD = self.language_model.get_input_embeddings()(inputs.input_ids_BT)
        return self._read(inputs, embedded_BTD, projected_IND, ())

    def _read(
        self, inputs: Inputs, embedded_BTD: Tensor, projected_IND: Tensor, watchers: Sequence[Watcher]
    ) -> Prediction:
        places = inputs.places
        if inputs.num_images == 0:
            # A batch without images must still touch the projector, or sharded engines wait for its gradient.
            embedded_BTD = embedded_BTD + 0.0 * projected_IND.sum()
            projected_IND = projected_IND[:0]
        else:
            self._check_placeholders(len(places.visual_N), projected_IND)
            visual_ND = projected_IND.flatten(0, 1).to(embedded_BTD.dtype)
            flat_D = embedded_BTD.flatten(0, 1).index_copy(0, places.visual_N, visual_ND)
            embedded_BTD = flat_D.view_as(embedded_BTD)
        # Without an attention mask the model is causal within each run of positions: right padding is
        # never seen by a real token, and packed records never see each other.
        watching = {"visual_maps": watchers} if watchers else {}
        hidden_BTD = packed_attention.read_rows(self.language_model, inputs, embedded_BTD, **watching)
        return Prediction(
            hidden_BTD=hidden_BTD,
            projected_IND=projected_IND,
            head_VD=self.lm_head.weight,
            bias_V=self.lm_head.bias,
        )

    @staticmethod
    def _check_placeholders(placeholders: int, projected_IND: Tensor) -> None:
        rows = projected_IND.shape[0] * projected_IND.shape[1]
        if placeholders != rows:
            raise ValueError(
                f"the batch has {placeholders} visual positions but the tower and projector gave {rows} "
                f"features ({projected_IND.shape[0]} images of {projected_IND.shape[1]}); "
                "check tokens_per_image against vision_feature_select_strategy"
            )
