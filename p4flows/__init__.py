"""Trainable linear layers that keep a property in training: invertible at O(n²), orthogonal, Lipschitz continuous.

P4Inv of Krämer, Köhler, Noé (arXiv:2010.07033): freeze A with its inverse and determinant, train a low-rank
perturbation, merge it every N steps. The same for orthogonal and for Lipschitz continuous layers; how to write your own
is in :mod:`p4flows.perturbation`. Plug-ins: :mod:`p4flows.nflows`, :mod:`p4flows.bgflow`, :mod:`p4flows.normflows`,
:mod:`p4flows.zuko`, :mod:`p4flows.lightning`; molecules: :mod:`p4flows.molecules`.
"""

from p4flows.layers.activations import BentIdentity, Elementwise, Inverse
from p4flows.layers.dense import InvertibleLinear
from p4flows.layers.invertible import P4Inv
from p4flows.layers.linear import P4Conv2d, P4Linear
from p4flows.layers.lipschitz import P4Lipschitz
from p4flows.layers.low_rank import LowRank
from p4flows.layers.orthogonal import P4Orthogonal
from p4flows.layers.perturbed import PAPER_BOUNDS
from p4flows.layers.stack import P4InvStack
from p4flows.outcomes import Correction, MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.training import unmerged as _  # noqa: F401 (it warns where a training forgets to merge)
from p4flows.training.averaging import AveragedModel
from p4flows.training.first_step import attach_on_first_step
from p4flows.training.report import Report, report
from p4flows.training.scheduler import MergeScheduler

__all__ = [
    "PAPER_BOUNDS",
    "AveragedModel",
    "BentIdentity",
    "Correction",
    "Elementwise",
    "Inverse",
    "InvertibleLinear",
    "LowRank",
    "MergeOutcome",
    "MergeScheduler",
    "P4Conv2d",
    "P4Inv",
    "P4InvStack",
    "P4Layer",
    "P4Linear",
    "P4Lipschitz",
    "P4Orthogonal",
    "Report",
    "__version__",
    "attach_on_first_step",
    "report",
]

__version__ = "0.2.0"
