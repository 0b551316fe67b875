"""Molecules for Boltzmann generators: energies and molecular dynamics by OpenMM, mixed coordinates."""

from p4flows.installing import missing

try:
    import openmm  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise missing("p4flows.molecules", "OpenMM and tqdm", "molecules") from error

from p4flows.molecules.alanine import alanine_dipeptide
from p4flows.molecules.chirality import Chirality
from p4flows.molecules.contents import cached_simulations, clear_cache
from p4flows.molecules.coordinates import MixedCoordinates
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.geometry import dihedral
from p4flows.molecules.molecule import Molecule
from p4flows.molecules.regularization import regularize_energy
from p4flows.molecules.sampling import simulate
from p4flows.molecules.torsions import Torsions
from p4flows.molecules.trajectories import load_trajectory
from p4flows.molecules.weights import ImportanceWeights, importance_weights

__all__ = [
    "Chirality",
    "ImportanceWeights",
    "MixedCoordinates",
    "Molecule",
    "OpenMMEnergy",
    "Torsions",
    "alanine_dipeptide",
    "cached_simulations",
    "clear_cache",
    "dihedral",
    "importance_weights",
    "load_trajectory",
    "regularize_energy",
    "simulate",
]
