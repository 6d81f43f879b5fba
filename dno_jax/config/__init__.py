"""The whole configuration: frozen pydantic models, read from YAML, overridden by `a.b=value`.

num_x counts, max_x is an inclusive bound, x_id identifies. A relative path in a file is relative to the file's folder,
one in an override to the directory the command runs in. Nothing here imports jax.
"""

from dno_jax.config.adapter import AdapterSection
from dno_jax.config.annotation import (
    AnnotationSection,
    ChatSection,
    EndpointSection,
    OpenAISection,
    PriceSection,
    TeacherSection,
)
from dno_jax.config.base import MIN_TEMPERATURE, Section, Stage
from dno_jax.config.identity import changes, deciding, stage_digest
from dno_jax.config.judges import (
    OracleSection,
    PythonSection,
    QualitySection,
    RewardModelSection,
    SelfSection,
    TableSection,
)
from dno_jax.config.loading import dump_config, kind_of, load_config, parse_config
from dno_jax.config.mesh import MeshSection
from dno_jax.config.reward import RewardConfig, RewardPairsSection
from dno_jax.config.runs import RunConfig, SftConfig, SftDataSection, SftModelSection
from dno_jax.config.sampling import CompletionServerSection, SamplingSection
from dno_jax.config.sections import (
    EvaluationSection,
    ModelConfigSection,
    PairingSection,
    PromptsSection,
    ReportSection,
)
from dno_jax.config.training import (
    LossName,
    LossSection,
    OptimizerSection,
    OuterSection,
    ReferenceSection,
    TrainingSection,
)
from dno_jax.config.yaml_reader import read_yaml

AnyConfig = RunConfig | SftConfig | RewardConfig  # whatever trains a model

__all__ = [
    "MIN_TEMPERATURE",
    "AdapterSection",
    "AnnotationSection",
    "AnyConfig",
    "ChatSection",
    "CompletionServerSection",
    "EndpointSection",
    "EvaluationSection",
    "LossName",
    "LossSection",
    "MeshSection",
    "ModelConfigSection",
    "OpenAISection",
    "OptimizerSection",
    "OracleSection",
    "OuterSection",
    "PairingSection",
    "PriceSection",
    "PromptsSection",
    "PythonSection",
    "QualitySection",
    "ReferenceSection",
    "ReportSection",
    "RewardConfig",
    "RewardModelSection",
    "RewardPairsSection",
    "RunConfig",
    "SamplingSection",
    "Section",
    "SelfSection",
    "SftConfig",
    "SftDataSection",
    "SftModelSection",
    "Stage",
    "TableSection",
    "TeacherSection",
    "TrainingSection",
    "changes",
    "deciding",
    "dump_config",
    "kind_of",
    "load_config",
    "parse_config",
    "read_yaml",
    "stage_digest",
]
