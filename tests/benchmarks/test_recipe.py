"""The recipe for effective sample sizes: its flow is a bijection that knows its angles; its parts go on from files."""

import itertools
import math

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("zuko")

from running import call

from benchmarks.molecules import own_samples, recipe
from benchmarks.molecules.circular import MIXES, circular_flow
from benchmarks.molecules.turning import turning
from benchmarks.paper import boltzmann_training
from benchmarks.paper.boltzmann import load_data
from p4flows.molecules import ImportanceWeights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P4FLOWS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_data(300)


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_the_flow_is_a_bijection_with_its_log_determinant(data, mix, circular):
    flow = circular_flow(data.coordinates, 3, mix, circular, hidden=16).double()
    z = data.z[:20].double()
    noise, logabsdet = flow._transform(z)
    back, of_inverse = flow._transform.inverse(noise)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(logabsdet, -of_inverse, rtol=0, atol=1e-10)
    jacobian = torch.func.jacrev(lambda x: flow._transform(x[None])[0][0])(z[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logabsdet[0], rtol=0, atol=1e-10)


def test_angles_that_turn_come_round(data):
    flow = circular_flow(data.coordinates, 4, "random", hidden=16).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torsions = data.coordinates.torsions
    which = turning(data.coordinates)
    assert 0 < len(which) < len(torsions.indices)
    with torch.no_grad():
        for i in which:
            low, high = data.z[:5].double(), data.z[:5].double()
            low[:, torsions.indices[i]] = torsions.low[i].double() + 1e-9
            high[:, torsions.indices[i]] = torsions.high[i].double() - 1e-9
            torch.testing.assert_close(flow.log_prob(low), flow.log_prob(high), rtol=0, atol=1e-5)
        noise = flow._distribution.draw(2_000).double()
        samples = flow._transform.inverse(noise)[0][:, torsions.indices[which]]
    margin = 1e-5 * (torsions.high - torsions.low)[which]
    assert (samples >= torsions.low[which] - margin).all()
    assert (samples <= torsions.high[which] + margin).all()


def test_the_base_is_normalised_at_every_temperature(data):
    base = circular_flow(data.coordinates, 1, "random", hidden=8)._distribution
    base.deviation *= 0.5
    drawn = base.draw(1_000, torch.Generator().manual_seed(0))
    plain, angles = base.sizes
    expected = torch.distributions.Normal(0, 0.5).log_prob(drawn[:, :plain]).sum(-1) - angles * math.log(2 * math.pi)
    torch.testing.assert_close(base.log_prob(drawn), expected)
    assert drawn[:, :plain].std() == pytest.approx(0.5, rel=0.02)
    assert drawn[:, plain:].abs().max() <= math.pi


def test_samples_are_drawn_by_their_weights():
    z = torch.arange(10_000.0)[:, None]
    log_weights = torch.where(z[:, 0] < 5_000, 0.0, math.log(3)).double()
    log_weights[0] = 50.0  # of no sample that is all there is
    log_weights[1] = -math.inf
    drawn = own_samples.resampled(z, ImportanceWeights(log_weights, log_weights > -math.inf), 0)
    assert len(drawn) == pytest.approx(10_000 * 2**2 / 5, rel=0.01)  # their effective sample size
    assert not (drawn == 1).any()
    assert (drawn == 0).double().mean() < 0.01
    assert (drawn >= 5_000).double().mean() == pytest.approx(0.75, abs=0.03)


def test_the_rate_falls_from_round_to_round():
    rounds = own_samples.Rounds(10, 100, boltzmann_training.Stage(1, lr=0.5))
    rates = [rounds.rate(i) for i in range(10)]
    assert rates[0] == 0.5
    assert rates[5] == pytest.approx(0.25)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))


def test_rounds_train_on_what_was_drawn_before(monkeypatch, tmp_path, data):
    seen = []
    monkeypatch.setattr(
        own_samples, "train", lambda flow, data, *_, **__: seen.append(data.z) or {"ms_per_step": 1000.0}
    )
    flow = circular_flow(data.coordinates, 2, "random", hidden=8)
    rounds = own_samples.Rounds(3, 200, boltzmann_training.Stage(2, seed=4))

    def train(name):
        return own_samples.train_on_own_samples(flow, data, rounds, lambda part: tmp_path / part, 0.9, name)

    seconds = train(data.z[:7])
    assert seconds > 3 * 2
    first, second, third = seen
    torch.testing.assert_close(first[:7], data.z[:7])
    assert len(first) > 7
    torch.testing.assert_close(third[: len(second)], second)
    assert len(third) > len(second) > len(first)
    assert data.coordinates.in_range(third).all()
    new = third[len(second) :].unique(dim=0)
    assert not (new[:, None] == second).all(-1).any()  # every round has noise of its own
    assert train(data.z[:7]) == seconds  # what was drawn is read
    torch.testing.assert_close(seen[-1], third)


def test_a_flow_ends_as_the_average_of_its_last_half(data):
    stage = boltzmann_training.Stage(40, batch=16, lr=1e-2, every=None)
    flows = [circular_flow(data.coordinates, 2, "InvertibleLinear", hidden=8) for _ in range(2)]
    boltzmann_training.train(flows[0], data, stage)
    boltzmann_training.train(flows[1], data, stage, average=0.5)
    last, averaged = (flow._transform._transforms[2].rotation for flow in flows)
    assert 0 < (last - averaged).abs().max() < 0.2
    z = data.z[:50]
    back, _ = flows[1]._transform.inverse(flows[1]._transform(z)[0])
    torch.testing.assert_close(back, z, rtol=0, atol=1e-3)


def test_the_recipe(monkeypatch, tmp_path):
    command = (
        "recipe --frames 300 --steps 20 --rounds 2 --couplings 2 --samples 100 --batch 16 --threads 1 --no-compiled"
    )
    results = call(monkeypatch, tmp_path, f"{command} --checkpoints {tmp_path / 'kept'}")
    rows = results["rows"]
    parts = ["likelihood", "own samples", "505 K", "424 K", "357 K", "300 K"]
    assert [(row["mix"], row["part"]) for row in rows] == [
        (m, p) for m in ("random", "InvertibleLinear") for p in parts
    ]
    assert all(0 < row["ess"] <= 1 and 0 < row["largest_weight"] <= 1 for row in rows)
    # By the samples alone: no coordinate is cut any more but those that hardly vary.
    assert rows[0]["rejected_fraction"] < 0.1
    goals = recipe.claims(results)
    assert [goal["holds"] for goal in goals] == [
        max(r["ess"] for r in rows if r["part"] == "own samples") >= 0.5,
        False,
    ]
    assert len(recipe.table(results).splitlines()) == 2 + len(rows)
    alone = call(monkeypatch, tmp_path, f"{command} --rounds 0 --mixes random --checkpoints {tmp_path / 'kept'}")
    assert [row["part"] for row in alone["rows"]] == ["likelihood"]
    assert recipe.claims(alone) == []
    again = call(monkeypatch, tmp_path, f"{command} --checkpoints {tmp_path / 'kept'}")
    for row in (*rows, *again["rows"]):
        row.pop("seconds")
    assert again["rows"] == rows
