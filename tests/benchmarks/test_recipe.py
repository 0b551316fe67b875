"""The recipe for effective sample sizes: its flow is a bijection that knows its angles; its parts go on from files."""

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
from benchmarks.paper.boltzmann import generate, load_data
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


def test_mirror_images_weigh_nothing(monkeypatch, data):
    flow = circular_flow(data.coordinates, 1, "random", hidden=8)
    _, _, weights = generate(flow, data, 100, 0)
    monkeypatch.setattr(type(data.molecule.chirality), "kept", lambda _, x: torch.arange(len(x)) % 2 == 0)
    _, _, kept = generate(flow, data, 100, 0)
    assert weights.in_range[1::2].any()
    assert kept.in_range.tolist() == [usable and i % 2 == 0 for i, usable in enumerate(weights.in_range.tolist())]
    assert (kept.log_weights[1::2] == -math.inf).all()


def test_samples_are_thinned_by_their_weights():
    z = torch.arange(10_000.0)[:, None]
    log_weights = torch.where(z[:, 0] < 5_000, 0.0, math.log(3)).double()
    log_weights[0] = 50.0  # of no sample that is all there is
    log_weights[1] = -math.inf
    rows, weights = own_samples.thinned(z, ImportanceWeights(log_weights, log_weights > -math.inf), 0)
    assert len(rows) == pytest.approx(5_000 + 5_000 / 2, rel=0.02)  # a weight of 1 is half the mean
    assert not (rows == 1).any()
    assert weights.sum() == pytest.approx(10_000 * 2**2 / 5, rel=0.02)  # their effective number
    assert weights[rows[:, 0] >= 5_000].sum() / weights.sum() == pytest.approx(0.75, abs=0.02)
    assert weights[rows[:, 0] == 0] == weights[-1]
    few, one = own_samples.thinned(z[:3], ImportanceWeights(log_weights[:3], log_weights[:3] > -math.inf), 0)
    assert few[0] == 0
    assert one[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="expected some that are not zero"):
        own_samples.thinned(z[1:2], ImportanceWeights(log_weights[1:2], log_weights[1:2] > -math.inf), 0)


def test_every_round_adds_samples_of_its_own(tmp_path, data):
    flow = circular_flow(data.coordinates, 2, "random", hidden=8)
    flow.train()
    settings = {"count": 200, "steps": 3, "batch": 2_000, "file": lambda i: tmp_path / f"{i}", "beside": data.z[:70]}
    rows = own_samples.OwnSamples(flow, data, **settings, seed=4)
    first, second, third = (rows(step).unique(dim=0) for step in (1, 4, 7))
    assert flow.training
    assert rows(9) is rows(7)

    def number_in(these, those):
        return (these[:, None] == those).all(-1).any(0).sum().item()

    for part in (first, second, third):
        assert number_in(part, data.z[:70]) > 60
        assert data.coordinates.in_range(part).all()
    assert len(first) - 70 > 1
    assert number_in(third, second) > 0.9 * len(second)
    assert len(third) > len(second) > len(first)
    with torch.no_grad():
        flow._transform._transforms[2].rotation.add_(1.0)
    # A training that goes on reads what was drawn by the flow as it was.
    torch.testing.assert_close(own_samples.OwnSamples(flow, data, **settings, seed=4)(8), rows(7))
    (tmp_path / "1").unlink()
    with pytest.raises(ValueError, match="expected what was drawn in round 1"):
        own_samples.OwnSamples(flow, data, **settings, seed=4)(8)
    later = own_samples.OwnSamples(flow, data, **settings | {"file": lambda i: tmp_path / f"later {i}"}, first=3)
    assert number_in(later(1).unique(dim=0), third) <= 70  # noise of its own


def test_a_training_on_own_samples_goes_on_where_it_was(monkeypatch, tmp_path, data):
    stage = boltzmann_training.Stage(9, batch=16, lr=1e-2, schedule="cosine", every=None)

    def train(folder, steps_seen, stop=None):
        flow = circular_flow(data.coordinates, 2, "InvertibleLinear", hidden=8)
        rows = own_samples.OwnSamples(flow, data, 100, 3, stage.batch, lambda i: tmp_path / f"{folder} {i}")

        def seen(step):
            if step == stop:
                raise KeyboardInterrupt
            steps_seen.append(step)
            return rows(step)

        path = tmp_path / folder
        monkeypatch.setattr(boltzmann_training.Checkpoint, "save_if_due", boltzmann_training.Checkpoint.save)
        monkeypatch.setattr(boltzmann_training, "_WINDOW", 1)
        monkeypatch.setattr(boltzmann_training, "_AVERAGED", 2)
        boltzmann_training.train(flow, data, stage, "", path, average=0.5, swaps=0.1, rows=seen)
        return flow.state_dict()

    whole = train("whole", [])
    start = circular_flow(data.coordinates, 2, "InvertibleLinear", hidden=8).state_dict()
    assert sum(not torch.equal(whole[name], start[name]) for name in whole) > 20
    with pytest.raises(KeyboardInterrupt):
        train("parts", [], stop=6)
    steps = []
    parts = train("parts", steps)
    assert steps == [6, 7, 8, 9]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)


def test_swaps_have_a_rate_of_their_own(data):
    flows = [circular_flow(data.coordinates, 2, "InvertibleLinear", hidden=8) for _ in range(2)]
    start = flows[0]._transform._transforms[3].transform.weight.detach().clone()
    stage = boltzmann_training.Stage(1, batch=16, lr=1e-2, every=None)
    for flow, swaps in zip(flows, (1.0, 0.1), strict=True):
        boltzmann_training.train(flow, data, stage, swaps=swaps)
    moved = [(flow._transform._transforms[3].transform.weight - start).abs().max().item() for flow in flows]
    assert moved == pytest.approx([1e-2, 1e-3], rel=1e-3)
    torch.testing.assert_close(*(flow._transform._transforms[2].rotation for flow in flows))


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


def test_a_training_too_short_for_an_average_counts(data):
    flow = circular_flow(data.coordinates, 2, "random", hidden=8)
    boltzmann_training.train(flow, data, boltzmann_training.Stage(3, batch=16, lr=1e-2), average=0.5)
    assert (flow._transform._transforms[2].rotation != 0).all()


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
