"""The typed settings of params.yaml. The file states every setting; the code has no defaults, but for
settings that files of an earlier version do not state; such a default keeps what was done before, except that of
`data.clips`.

Each section of the file is a pydantic model in one of these modules; `tree.Params` is the root.
"""

from phantom.config.base import Role, Section
from phantom.config.clip_filter import COLUMNS, FLAGS, TEXTS, ClipFilter
from phantom.config.cluster import Cluster, Compute
from phantom.config.data import Data, Encode, OpenVid, Worlds
from phantom.config.evaluation import (
    NATIVE,
    PUBLISHED_REFINE,
    PUBLISHED_SURPRISE,
    VIDEOJAM_GUIDANCE,
    Evaluate,
    Judge,
    LikePhys,
    PhyGround,
    PhysicsIQ,
    Refine,
    Sampling,
    StateSource,
    Surprise,
    VBench2,
    VideoPhy,
    Vlm,
)
from phantom.config.loading import (
    PRESETS,
    apply_overrides,
    load_params,
    preset_names,
    preset_path,
    validate,
)
from phantom.config.model import Coupling, Models, Physics
from phantom.config.services import Register, Storage, Tracking
from phantom.config.training import Mesh, Optimizer, RecursiveWeight, Train
from phantom.config.tree import Params, all_keys, field_of, identity, section_names, select, shortest_names

__all__ = [
    "COLUMNS",
    "FLAGS",
    "NATIVE",
    "PRESETS",
    "PUBLISHED_REFINE",
    "PUBLISHED_SURPRISE",
    "TEXTS",
    "VIDEOJAM_GUIDANCE",
    "ClipFilter",
    "Cluster",
    "Compute",
    "Coupling",
    "Data",
    "Encode",
    "Evaluate",
    "Judge",
    "LikePhys",
    "Mesh",
    "Models",
    "OpenVid",
    "Optimizer",
    "Params",
    "PhyGround",
    "Physics",
    "PhysicsIQ",
    "RecursiveWeight",
    "Refine",
    "Register",
    "Role",
    "Sampling",
    "Section",
    "StateSource",
    "Storage",
    "Surprise",
    "Tracking",
    "Train",
    "VBench2",
    "VideoPhy",
    "Vlm",
    "Worlds",
    "all_keys",
    "apply_overrides",
    "field_of",
    "identity",
    "load_params",
    "preset_names",
    "preset_path",
    "section_names",
    "select",
    "shortest_names",
    "validate",
]
