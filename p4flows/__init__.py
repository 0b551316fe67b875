"""Trainable invertible linear layers whose inverse and log-determinant cost O(n²).

P4Inv of Krämer, Köhler, Noé (arXiv:2010.07033): freeze A with its inverse and determinant, train a low-rank
perturbation, merge it every N steps. Plug-ins: :mod:`p4flows.nflows`, :mod:`p4flows.bgflow`,
:mod:`p4flows.lightning`; molecules: :mod:`p4flows.molecules`.
"""

from p4flows.activations import BentIdentity, Elementwise, Inverse
from p4flows.averaging import AveragedModel
from p4flows.invertible import P4Inv
from p4flows.linear import P4Linear
from p4flows.perturbation import Correction, MergeOutcome, P4Layer
from p4flows.scheduler import MergeScheduler, attach_on_first_step
from p4flows.stack import P4InvStack

__all__ = [
    "AveragedModel",
    "BentIdentity",
    "Correction",
    "Elementwise",
    "Inverse",
    "MergeOutcome",
    "MergeScheduler",
    "P4Inv",
    "P4InvStack",
    "P4Layer",
    "P4Linear",
    "__version__",
    "attach_on_first_step",
]

__version__ = "0.1.0"
