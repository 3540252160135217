"""The configuration tree, and how it is read from YAML and written back."""

from llava_kd.config.adapters import LoraConfig
from llava_kd.config.data import DataConfig, PackingConfig, SourceConfig
from llava_kd.config.evaluate import EvaluateConfig, HeldOutConfig, SliceConfig
from llava_kd.config.models import PARTS, Dtype, StudentConfig, TeacherConfig
from llava_kd.config.reading import dump, load
from llava_kd.config.running import CheckpointConfig, EngineConfig, LogConfig, OptimConfig
from llava_kd.config.sections import (
    CrossEntropyConfig,
    Divergence,
    KLConfig,
    ObjectiveConfig,
    RelationConfig,
    TrainConfig,
)
from llava_kd.config.terms import AttentionConfig, DBiLDConfig, VisualSwitchConfig

__all__ = [
    "PARTS",
    "AttentionConfig",
    "CheckpointConfig",
    "CrossEntropyConfig",
    "DBiLDConfig",
    "DataConfig",
    "Divergence",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "HeldOutConfig",
    "KLConfig",
    "LogConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PackingConfig",
    "RelationConfig",
    "SliceConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "VisualSwitchConfig",
    "dump",
    "load",
]
