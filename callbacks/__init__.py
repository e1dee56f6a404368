"""What plugs into a Trainer: a top-level package of its own, which only the command line of ``lit_grpo`` imports.

``lit_grpo`` is the library: models, losses, data, engines. What stands here decides *when* they act in a run.
"""

from callbacks.checkpoints import Checkpoints
from callbacks.learning_curve import LearningCurve
from callbacks.ledger import Ledger
from callbacks.outliers import Outliers
from callbacks.progress import PhaseProgress
from callbacks.reference_cache import ReferenceCache
from callbacks.results import Results
from callbacks.rollout import HFRollout, Rollout, VLLMRollout
from callbacks.sample_table import SampleTable
from callbacks.save_pretrained import SavePretrained
from callbacks.stop_on_signal import StopOnSignal
from callbacks.theory_monitor import TheoryMonitor
from callbacks.whereabouts import Whereabouts

__all__ = [
    "Checkpoints",
    "HFRollout",
    "LearningCurve",
    "Ledger",
    "Outliers",
    "PhaseProgress",
    "ReferenceCache",
    "Results",
    "Rollout",
    "SampleTable",
    "SavePretrained",
    "StopOnSignal",
    "TheoryMonitor",
    "VLLMRollout",
    "Whereabouts",
]
