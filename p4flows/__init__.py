"""Trainable invertible linear layers whose inverse and log-determinant cost O(n²).

P4Inv of Krämer, Köhler, Noé (arXiv:2010.07033): freeze A with its inverse and determinant, train a low-rank
perturbation, merge it every N steps. Plug-ins: :mod:`p4flows.nflows`, :mod:`p4flows.bgflow`,
:mod:`p4flows.normflows`, :mod:`p4flows.zuko`, :mod:`p4flows.lightning`; molecules: :mod:`p4flows.molecules`.
"""

from p4flows.layers.activations import BentIdentity, Elementwise, Inverse
from p4flows.layers.dense import InvertibleLinear
from p4flows.layers.invertible import P4Inv
from p4flows.layers.linear import P4Linear
from p4flows.layers.perturbed import PAPER_BOUNDS
from p4flows.layers.stack import P4InvStack
from p4flows.perturbation import Correction, MergeOutcome, P4Layer
from p4flows.training import unmerged as _  # noqa: F401 (it warns where a training forgets to merge)
from p4flows.training.averaging import AveragedModel
from p4flows.training.report import Report, report
from p4flows.training.scheduler import MergeScheduler, attach_on_first_step

__all__ = [
    "PAPER_BOUNDS",
    "AveragedModel",
    "BentIdentity",
    "Correction",
    "Elementwise",
    "Inverse",
    "InvertibleLinear",
    "MergeOutcome",
    "MergeScheduler",
    "P4Inv",
    "P4InvStack",
    "P4Layer",
    "P4Linear",
    "Report",
    "__version__",
    "attach_on_first_step",
    "report",
]

__version__ = "0.2.0"
