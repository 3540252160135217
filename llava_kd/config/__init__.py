"""The configuration tree, and how it is read from YAML and written back."""

from llava_kd.config.adapters import LoraConfig
from llava_kd.config.data import DataConfig, PackingConfig, SourceConfig
from llava_kd.config.evaluate import EvaluateConfig, HeldOutConfig, SliceConfig
from llava_kd.config.models import PARTS, Dtype, PeerConfig, StudentConfig, TeacherConfig
from llava_kd.config.objective import ObjectiveConfig, objective_type, stage_type
from llava_kd.config.pictures import HardConfig, MixupConfig, PicturesConfig
from llava_kd.config.reading import dump, load, plugins_of
from llava_kd.config.running import CheckpointConfig, EngineConfig, LogConfig, OptimConfig, ProfileConfig
from llava_kd.config.sections import TrainConfig
from llava_kd.config.teaching.on_policy import OnPolicyConfig, WriterServerConfig
from llava_kd.config.teaching.token_policy import SpanConfig, TokenPolicyConfig

__all__ = [
    "PARTS",
    "CheckpointConfig",
    "DataConfig",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "HardConfig",
    "HeldOutConfig",
    "LogConfig",
    "LoraConfig",
    "MixupConfig",
    "ObjectiveConfig",
    "OnPolicyConfig",
    "OptimConfig",
    "PackingConfig",
    "PeerConfig",
    "PicturesConfig",
    "ProfileConfig",
    "SliceConfig",
    "SourceConfig",
    "SpanConfig",
    "StudentConfig",
    "TeacherConfig",
    "TokenPolicyConfig",
    "TrainConfig",
    "WriterServerConfig",
    "dump",
    "load",
    "objective_type",
    "plugins_of",
    "stage_type",
]
