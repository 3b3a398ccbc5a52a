"""The nodes, by their stable ids."""

from __future__ import annotations

from .datasets import Diff2FlowImageDataset, Diff2FlowImages
from .depth import Diff2FlowDepth, Diff2FlowDepthDataset
from .depth_files import Diff2FlowDepthMetrics, Diff2FlowLoadDepth, Diff2FlowSaveDepth
from .evaluate import Diff2FlowEvaluate
from .loading import Diff2FlowCheckpointLoader, Diff2FlowLoraLoader
from .lora import Diff2FlowLoraConfig
from .recipes import Diff2FlowReflowRecipe
from .reflow import Diff2FlowReflowPairs
from .sampling import Diff2FlowModel, Diff2FlowSampler, Diff2FlowSigmas, Diff2FlowSolver
from .sharing import Diff2FlowExportDiffusers, Diff2FlowSaveCheckpoint
from .straightness import Diff2FlowStepsGrid, Diff2FlowStraightness
from .training import Diff2FlowTrain
from .training_options import Diff2FlowLossConfig, Diff2FlowOptimizerConfig, Diff2FlowTrainWatch

NODES = {
    "Diff2Flow Checkpoint Loader": Diff2FlowCheckpointLoader,
    "Diff2Flow LoRA Loader": Diff2FlowLoraLoader,
    "Diff2Flow Model": Diff2FlowModel,
    "Diff2Flow Sampler": Diff2FlowSampler,
    "Diff2Flow Solver": Diff2FlowSolver,
    "Diff2Flow Sigmas": Diff2FlowSigmas,
    "Diff2Flow Steps Grid": Diff2FlowStepsGrid,
    "Diff2Flow Straightness": Diff2FlowStraightness,
    "Diff2Flow Evaluate": Diff2FlowEvaluate,
    "Diff2Flow Depth": Diff2FlowDepth,
    "Diff2Flow Load Depth": Diff2FlowLoadDepth,
    "Diff2Flow Save Depth": Diff2FlowSaveDepth,
    "Diff2Flow Depth Metrics": Diff2FlowDepthMetrics,
    "Diff2Flow Image Dataset": Diff2FlowImageDataset,
    "Diff2Flow Images": Diff2FlowImages,
    "Diff2Flow Depth Dataset": Diff2FlowDepthDataset,
    "Diff2Flow Reflow Pairs": Diff2FlowReflowPairs,
    "Diff2Flow Reflow Recipe": Diff2FlowReflowRecipe,
    "Diff2Flow LoRA Config": Diff2FlowLoraConfig,
    "Diff2Flow Loss Config": Diff2FlowLossConfig,
    "Diff2Flow Optimizer Config": Diff2FlowOptimizerConfig,
    "Diff2Flow Train Watch": Diff2FlowTrainWatch,
    "Diff2Flow Train": Diff2FlowTrain,
    "Diff2Flow Save Checkpoint": Diff2FlowSaveCheckpoint,
    "Diff2Flow Export to Diffusers": Diff2FlowExportDiffusers,
}

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES.values()}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: name for name, node in NODES.items()}
