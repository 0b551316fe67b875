"""Molecular dynamics as OpenMM's own documentation writes it: knows nothing of p4flows.

``python reference_script.py molecule.pdb TEMPERATURE FRAMES STRIDE SEED trajectory.dcd``
"""

import sys

from openmm import LangevinMiddleIntegrator, Platform
from openmm.app import DCDReporter, ForceField, NoCutoff, PDBFile, Simulation
from openmm.unit import femtosecond, kelvin, picosecond

path, temperature, frames, stride, seed, output = sys.argv[1:]
pdb = PDBFile(path)
forcefield = ForceField("amber99sbildn.xml", "amber99_obc.xml")
system = forcefield.createSystem(pdb.topology, nonbondedMethod=NoCutoff)
integrator = LangevinMiddleIntegrator(float(temperature) * kelvin, 1 / picosecond, 1 * femtosecond)
integrator.setRandomNumberSeed(int(seed))
simulation = Simulation(pdb.topology, system, integrator, Platform.getPlatformByName("Reference"))
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy()
simulation.context.setVelocitiesToTemperature(float(temperature) * kelvin, int(seed))
simulation.step(20_000)
simulation.reporters.append(DCDReporter(output, int(stride)))
simulation.step(int(frames) * int(stride))
