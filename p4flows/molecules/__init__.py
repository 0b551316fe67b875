"""Molecules for Boltzmann generators: energies and molecular dynamics by OpenMM, mixed coordinates."""

from p4flows.installing import missing

try:
    import openmm  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise missing("p4flows.molecules", "OpenMM and tqdm", "molecules") from error

from p4flows.molecules.alanine import Molecule, alanine_dipeptide
from p4flows.molecules.coordinates import MixedCoordinates
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.geometry import dihedral
from p4flows.molecules.regularization import regularize_energy
from p4flows.molecules.sampling import simulate
from p4flows.molecules.weights import ImportanceWeights, importance_weights

__all__ = [
    "ImportanceWeights",
    "MixedCoordinates",
    "Molecule",
    "OpenMMEnergy",
    "alanine_dipeptide",
    "dihedral",
    "importance_weights",
    "regularize_energy",
    "simulate",
]
