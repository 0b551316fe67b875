"""Our simulations of alanine dipeptide against OpenMM's own script, and both against equipartition."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import app, unit

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.molecules.turning import turning
from benchmarks.molecules.validation_figure import draw
from p4flows.molecules import (
    MixedCoordinates,
    Molecule,
    OpenMMEnergy,
    alanine_dipeptide,
    dihedral,
    load_trajectory,
    simulate,
)

__all__ = ["FILES", "add_arguments", "claims", "run", "table"]

FILES = ("validation.json", "validation.png")
FORCEFIELD = ("amber99sbildn.xml", "amber99_obc.xml")  # as in the script
LADDER = [300.0, 378.0, 476.0, 600.0]
STRIDE = 100
BINS = 36
_BLOCKS = 20


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=10_000, help="0.1 ps apart, at each temperature and for each way")
    parser.add_argument("--seed", type=int, default=0, help="of all simulations")


def run(args: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alanine.pdb"
        ours = alanine_dipeptide()
        with open(path, "w") as file:
            app.PDBFile.writeFile(ours.topology, ours.positions * unit.nanometer, file)
        molecule = Molecule.from_pdb(path, FORCEFIELD)
        reference = dict(zip((300, 600), _reference(path, args.frames, args.seed, molecule), strict=True))
    exchanged = simulate(molecule, LADDER, args.frames, STRIDE, args.seed, exchange=200)
    plain = simulate(molecule, [300, 600], args.frames, STRIDE, args.seed)
    rows = []
    for i, temperature in enumerate((300, 600)):
        ways = {
            "OpenMM's script": reference[temperature],
            "simulate": plain[i],
            "replica exchange": exchanged[[0, -1][i]],
        }
        rows += [
            {"temperature": temperature, "way": way, **_measure(x, molecule, temperature)} for way, x in ways.items()
        ]
    results = {"frames": args.frames, "bins": BINS, "ladder": LADDER, "rows": rows}
    for row in rows:
        row.update(_compare(row, next(r for r in rows if r["temperature"] == row["temperature"])))
    print(save("validation", results, args.out))
    print(draw(results, args.out / "validation.png"))
    print(f"{claims_table({'claims': claims(results)})}\n\n{table(results)}")
    return results


def _reference(path: Path, frames: int, seed: int, molecule: Molecule) -> list[np.ndarray]:
    """The frames of OpenMM's script at 300 K and at 600 K, which run side by side."""
    script = Path(__file__).with_name("reference_script.py")

    def trajectory(temperature: int) -> np.ndarray:
        output = path.with_name(f"{temperature}.dcd")
        arguments = [path, temperature, frames, STRIDE, seed + 1, output]
        subprocess.run([sys.executable, script, *map(str, arguments)], check=True)
        return load_trajectory(output, molecule)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(trajectory, (300, 600)))


def _measure(x: np.ndarray, molecule: Molecule, temperature: float) -> dict[str, Any]:
    """The share of a coordinate in kT, the population of φ > 0, and histograms where φ < 0; each with its error."""
    positions = torch.from_numpy(x).double()
    coordinates = MixedCoordinates(molecule, positions)
    z = coordinates(positions)[0].requires_grad_()
    structures, volume = coordinates.inverse(z)
    energy = OpenMMEnergy(molecule, temperature)(structures)
    (gradient,) = torch.autograd.grad((energy - volume).sum(), z)
    angles = coordinates.torsions.indices[turning(coordinates)]
    share = (z * gradient).detach().numpy()
    share = np.delete(share, angles.numpy(), axis=1).mean(1)
    phi, psi = (dihedral(*(positions[:, i] for i in atoms)).numpy() for atoms in (molecule.phi, molecule.psi))
    edges = np.linspace(-np.pi, np.pi, BINS + 1)
    left = phi < 0
    measured = {
        # ⟨z ∂(u - ln|∂x/∂z|)/∂z⟩ is exactly one for a coordinate whose density vanishes at the ends of its range.
        "share": share,
        "energy": energy.detach().numpy(),
        "phi_positive": (~left).astype(float),
        "phi": _indicators(phi, edges) * left[:, None],
        "psi": _indicators(psi, edges) * left[:, None],
    }
    result = {}
    for name, values in measured.items():
        blocks = np.stack([block.mean(0) for block in np.array_split(values, _BLOCKS)])
        if name in ("phi", "psi"):
            blocks /= blocks.sum(1, keepdims=True)
        result[name] = blocks.mean(0).tolist()
        result[f"{name}_error"] = (blocks.std(0, ddof=1) / np.sqrt(_BLOCKS)).tolist()
    return result


def _indicators(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.eye(len(edges) - 1)[np.clip(np.digitize(values, edges) - 1, 0, len(edges) - 2)]


def _compare(row: dict, reference: dict) -> dict[str, float]:
    """Largest deviation of a bin from the reference, in errors of both, and the total variation, which is in [0, 1]."""
    result = {}
    for name in ("phi", "psi"):
        a, b = np.array(row[name]), np.array(reference[name])
        error = np.hypot(row[f"{name}_error"], reference[f"{name}_error"])
        filled = error > 0
        result[f"{name}_deviation"] = float(np.max(np.abs(a - b)[filled] / error[filled], initial=0.0))
        result[f"{name}_distance"] = float(np.abs(a - b).sum() / 2)
    return result


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether our simulations agree with OpenMM's script, and all with equipartition, as far as their errors tell."""
    shares = [abs(row["share"] - 1) / row["share_error"] for row in results["rows"]]
    bins = [max(row["phi_deviation"], row["psi_deviation"]) for row in results["rows"]]
    return [
        claim(
            "equipartition: a stiff coordinate has its share of the energy",
            "1 kT",
            "each way and temperature within 3 of its errors",
            f"{max(shares):.1f} errors at most",
            max(shares) <= 3,
        ),
        claim(
            "marginals of φ and ψ where φ < 0, beside OpenMM's script",
            "equal",
            f"each of {results['bins']} bins within 4 errors of both",
            f"{max(bins):.1f} errors at most",
            max(bins) <= 4,
        ),
    ]


def table(results: dict[str, Any]) -> str:
    """One row for each temperature and way, as a Markdown table."""
    lines = [
        "| T (K) | way | share (kT) | mean energy (kT) | φ > 0 "
        "| φ: distance | φ: worst bin | ψ: distance | ψ: worst bin |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [
            f"{row['share']:.4f} ± {row['share_error']:.4f}",
            f"{row['energy']:.2f} ± {row['energy_error']:.2f}",
            f"{row['phi_positive']:.3f} ± {row['phi_positive_error']:.3f}",
            *(f"{row[f'{name}_{kind}']:.3f}" for name in ("phi", "psi") for kind in ("distance", "deviation")),
        ]
        lines.append(f"| {row['temperature']} | {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)
