"""The density of generated structures: a four-atom molecule of which every integral is known by quadrature."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import MixedCoordinates, OpenMMEnergy, dihedral, importance_weights
from p4flows.molecules.geometry import angle, distance, place

KT = 8.31446261815324e-3 * 300
BONDS = [(0, 1, 0.15, 3_000.0), (1, 2, 0.14, 3_000.0), (3, 2, 0.13, 3_000.0)]  # nm, kJ/mol/nm²: floppy
ANGLES = [(0, 1, 2, 1.9, 20.0), (3, 2, 1, 1.8, 20.0)]  # rad, kJ/mol/rad²
TORSION = (3, 2, 1, 0, 2, 0.7, 2.0)  # period, phase, kJ/mol


def chain():
    """Four atoms in a row: bonds, angles and a torsion, of which the Boltzmann density is a product."""
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    forces = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for bond in BONDS:
        forces[0].addBond(*bond)
    for bend in ANGLES:
        forces[1].addAngle(*bend)
    forces[2].addTorsion(*TORSION)
    for force in forces:
        system.addForce(force)
    return system


def integral(f, low, high, n=20_001):
    x = np.linspace(low, high, n)
    return np.trapezoid(f(x), x) if hasattr(np, "trapezoid") else np.trapz(f(x), x)


def boltzmann_factors():
    """The factors of exp(-u) over r, θ and φ with their volume elements r², sin θ and 1, and the ranges of those."""
    for _, _, r0, k in BONDS:
        yield lambda r, r0=r0, k=k: r**2 * np.exp(-k * (r - r0) ** 2 / (2 * KT)), 0, 0.6
    for *_, t0, k in ANGLES:
        yield lambda t, t0=t0, k=k: np.sin(t) * np.exp(-k * (t - t0) ** 2 / (2 * KT)), 0, np.pi
    *_, period, phase, k = TORSION
    yield lambda f: np.exp(-k * (1 + np.cos(period * f - phase)) / KT), -np.pi, np.pi


def structures(n):
    """Frames that the coordinates take their scales from; the dihedrals leave a gap, in the middle of a well."""
    noise = torch.randn(6, n, dtype=torch.float64)
    a, b, c = torch.zeros(3, n, 3, dtype=torch.float64)
    b[:, 0] = 0.15 + 0.02 * noise[0]
    r, theta = 0.14 + 0.02 * noise[1], 1.9 + 0.3 * noise[2]
    c[:, 0], c[:, 1] = b[:, 0] - r * theta.cos(), r * theta.sin()
    phi = 1.5 * torch.tanh(noise[5])
    d = place(c, b, a, 0.13 + 0.02 * noise[3], (1.8 + 0.3 * noise[4]).clamp(0.1, 3), phi)
    return torch.stack([a, b, c, d], 1)


@pytest.fixture(scope="module")
def coordinates():
    torch.manual_seed(1)
    return MixedCoordinates(np.array([[3, 2, 1, 0]]), np.array([0, 1, 2]), structures(2_000))


def wide_gaussian(n, scale=1.7):
    """Evenly spread samples of a Gaussian in z, so that averages are good to 1e-3; their log-density."""
    uniform = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(n, dtype=torch.float64)
    z = scale * math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-12, 1 - 1e-12) - 1)
    return z, torch.distributions.Normal(0.0, scale).log_prob(z).sum(-1)


@pytest.fixture(scope="module")
def drawn(coordinates):
    z, log_q = wide_gaussian(2**18)
    x, logabsdet = coordinates.inverse(z)
    return z, log_q, x, logabsdet


@pytest.fixture(scope="module")
def energies(drawn):
    """Reduced energies that make p normalised: u + ln Z, with Z by quadrature in bonds, angles and the torsion."""
    x = drawn[2].unflatten(-1, (4, 3)).numpy()
    return torch.from_numpy(_energy(x)) + sum(math.log(integral(*factor)) for factor in boltzmann_factors())


def _energy(x):
    """The energy of chain(), which one test compares with OpenMM's, in kT."""
    x = torch.from_numpy(x)
    u = sum(k / 2 * (distance(x[:, i], x[:, j]) - r0) ** 2 for i, j, r0, k in BONDS)
    u += sum(k / 2 * (angle(x[:, i], x[:, j], x[:, m]) - t0) ** 2 for i, j, m, t0, k in ANGLES)
    *_, period, phase, k = TORSION
    u += k * (1 + torch.cos(period * torsion(x) - phase))
    return (u / KT).numpy()


def torsion(x):
    return dihedral(*(x[:, i] for i in TORSION[:4]))


def test_energies_are_those_of_openmm(drawn):
    x = drawn[2][:200].unflatten(-1, (4, 3))
    torch.testing.assert_close(OpenMMEnergy(chain(), 300)(x).numpy(), _energy(x.numpy()), rtol=1e-6, atol=1e-6)


def test_in_range_is_where_forward_returns_what_inverse_got(coordinates, drawn):
    z, _, x, _ = drawn
    inside = coordinates.in_range(z)
    back = (coordinates(x)[0] - z).abs().max(-1).values < 1e-6
    assert (inside == back).all()
    assert 0.85 < inside.double().mean() < 0.95
    # Every coordinate has its part in that: the block, the bond, the angle and the dihedral.
    raw = z[:, 3:] * coordinates.std + coordinates.mean
    only_block = (raw[:, 0] > 0) & (raw[:, 1] > 0) & (raw[:, 1] < math.pi) & ~inside
    only_block &= (raw[:, 2] >= coordinates.cut) & (raw[:, 2] < coordinates.cut + 2 * math.pi)
    assert only_block.sum() > 10
    assert ((raw[:, 1] < 0) | (raw[:, 1] > math.pi)).sum() > 10
    assert ((raw[:, 2] < coordinates.cut) | (raw[:, 2] >= coordinates.cut + 2 * math.pi)).sum() > 10
    far = z[:1].clone()
    far[0, 3] = -20.0
    assert not coordinates.in_range(far)


def test_data_are_in_range_in_both_types(coordinates):
    x = structures(5_000)
    assert coordinates.in_range(coordinates(x)[0]).all()
    single = MixedCoordinates(np.array([[3, 2, 1, 0]]), np.array([0, 1, 2]), x.float())
    assert single.in_range(single(x.float())[0]).all()
    z = torch.full((2, 6), math.nan)
    z[1] = math.inf
    assert not single.in_range(z).any()
    assert single.in_range(torch.zeros(6)).shape == ()


def test_weights_agree_with_quadrature(coordinates, drawn, energies):
    z, log_q, x, logabsdet = drawn
    inside = coordinates.in_range(z)
    weights = importance_weights(log_q, energies, logabsdet, inside)
    # p is normalised by integrals over bonds, angles and the torsion, which know nothing of z.
    accepted = weights.log_weights[inside].exp()
    assert accepted.mean().item() == pytest.approx(1, abs=1e-3)
    assert weights.log_partition == pytest.approx(0, abs=1e-3)
    # The share in range of the dihedral is known, and so are averages over p.
    low, high = ((coordinates.cut + k - coordinates.mean[2]) / coordinates.std[2] / 1.7 for k in (0, 2 * math.pi))
    share = (torch.special.ndtr(high) - torch.special.ndtr(low)).item()
    raw = z[:, 5] * coordinates.std[2] + coordinates.mean[2]
    in_turn = (raw >= coordinates.cut) & (raw < coordinates.cut + 2 * math.pi)
    assert in_turn.double().mean().item() == pytest.approx(share, abs=1e-3)
    w = weights.log_weights.softmax(0)
    *_, (torsional, low, high) = boltzmann_factors()
    for f, g in ((np.cos, torch.cos), (np.sin, torch.sin)):
        expected = integral(lambda t, f=f: f(t) * torsional(t), low, high) / integral(torsional, low, high)
        assert (w * g(torsion(x.unflatten(-1, (4, 3))))).sum().item() == pytest.approx(expected, abs=1e-3)
    (bond, low, high) = list(boltzmann_factors())[2]
    expected = integral(lambda r: r * bond(r), low, high) / integral(bond, low, high)
    found = (w * distance(*(x.unflatten(-1, (4, 3))[:, i] for i in (3, 2)))).sum().item()
    assert found == pytest.approx(expected, abs=1e-3 * expected)


def test_weights_without_rejection_are_wrong(coordinates, drawn, energies):
    z, log_q, _, logabsdet = drawn
    everything = torch.ones(len(z), dtype=torch.bool)
    wrong = importance_weights(log_q, energies, logabsdet, everything)
    right = importance_weights(log_q, energies, logabsdet, coordinates.in_range(z))
    assert wrong.log_weights.exp().mean() > 1.5
    assert wrong.effective_sample_size < right.effective_sample_size / 10
    assert wrong.largest_share > 10 * right.largest_share


def test_figures_of_weights():
    log_q = torch.tensor([0.0, 0.0, 0.0, -50.0])
    energy = torch.tensor([0.0, -math.log(3), math.inf, 0.0])
    weights = importance_weights(log_q, energy, torch.zeros(4), torch.tensor([True, True, True, False]))
    assert weights.log_weights.dtype == torch.float64
    expected = [0.75, 2.25, 0, 0]
    torch.testing.assert_close(
        weights.log_weights.exp(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert weights.share_rejected == 0.25
    assert weights.effective_sample_size == pytest.approx(3**2 / (0.75**2 + 2.25**2))
    assert weights.largest_share == pytest.approx(0.75)
    assert weights.log_partition == pytest.approx(0, abs=1e-6)
    nothing = importance_weights(log_q, energy, torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    assert nothing.effective_sample_size == 0
    assert nothing.share_rejected == 1
    assert nothing.log_partition == -math.inf
    assert math.isnan(nothing.largest_share)


def test_samples_out_of_range_may_be_anything_and_have_no_gradient():
    log_q = torch.tensor([0.5, math.nan, -math.inf], requires_grad=True)
    weights = importance_weights(
        log_q,
        torch.tensor([0.5, math.nan, -math.inf]),
        torch.tensor([0.0, math.inf, math.nan]),
        torch.tensor([True, False, False]),
    )
    assert weights.log_weights.tolist() == [pytest.approx(-1 - math.log(3)), -math.inf, -math.inf]
    (-weights.log_weights[weights.in_range].mean()).backward()
    assert log_q.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_q": torch.zeros(3, 1)}, r"log_q: expected floating-point \(B,\), got torch.float32 \(3, 1\)"),
        ({"energy": torch.zeros(2)}, r"energy: expected \(3,\), as log_q, got \(2,\)"),
        ({"logabsdet": np.zeros(3)}, "logabsdet: expected floating-point .*, got float64"),
        ({"in_range": torch.ones(3)}, r"in_range: expected bool \(3,\)"),
        ({"log_q": torch.full((3,), -math.inf)}, "log_q: expected finite values of samples in range, got -inf"),
        ({"energy": torch.full((3,), math.nan)}, "energy: expected finite"),
        ({"energy": torch.full((3,), -math.inf)}, "energy: expected finite"),
    ],
)
def test_wrong_arguments_of_weights(arguments, message):
    given = {name: torch.zeros(3) for name in ("log_q", "energy", "logabsdet")}
    with pytest.raises(ValueError, match=message):
        importance_weights(**{**given, "in_range": torch.ones(3, dtype=torch.bool), **arguments})
