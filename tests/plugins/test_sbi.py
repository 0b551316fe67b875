"""sbi: optimizer and training loop are inside one call of the library. The recipe of the README."""

import itertools

import pytest
import torch

sbi = pytest.importorskip("sbi", reason="sbi is not installed (pip install 'p4flows[sbi]')")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_npe_on_nflows_trains_learned_permutations(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # every version of sbi logs to ./sbi-logs unless told otherwise, each in its own way
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    from p4flows import attach_on_first_step
    from p4flows.nflows import P4InvLinear, replace_permutations

    torch.manual_seed(0)
    mixing = torch.randn(3, 3)
    theta = torch.randn(2000, 3)
    x = theta @ mixing + 0.3 * torch.randn(2000, 3)
    schedulers, layers = [], []

    def build(theta, x):
        estimator = posterior_nn("maf", hidden_features=20, num_transforms=3)(theta, x)
        replaced = replace_permutations(estimator, rank=1)
        schedulers.append(attach_on_first_step(estimator, every=10))
        layers.extend(module for module in estimator.modules() if isinstance(module, P4InvLinear))
        assert replaced == len(layers) == 3
        return estimator

    inference = NPE(prior=torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3)), density_estimator=build)
    inference.append_simulations(theta, x)
    inference.train(max_num_epochs=60, training_batch_size=50, learning_rate=3e-3, show_train_summary=False)
    scheduler = schedulers[0]()
    assert (tmp_path / "sbi-logs").is_dir()
    assert scheduler.steps >= 30 * 10
    assert scheduler.counters["merged"] == 3 * (scheduler.steps // 10)
    assert all((layer.A != 0).all() for layer in layers)
    posterior = inference.build_posterior()
    truth = torch.tensor([0.5, -1.0, 1.0])
    samples = posterior.sample((4000,), x=truth @ mixing, show_progress_bars=False)
    # Linear and Gaussian, so the posterior is known.
    covariance = torch.linalg.inv(torch.eye(3) + mixing @ mixing.T / 0.09)
    mean = covariance @ mixing @ (truth @ mixing) / 0.09
    deviation = covariance.diagonal().sqrt()
    print("posterior mean", samples.mean(0).tolist(), "exact", mean.tolist())
    print("posterior std", samples.std(0).tolist(), "exact", deviation.tolist())
    print("scheduler", scheduler.counters, "steps", scheduler.steps)
    assert ((samples.mean(0) - mean).abs() < 0.7 * deviation).all()
    assert ((samples.std(0) / deviation - 1).abs() < 0.4).all()


def test_every_round_merges(monkeypatch, tmp_path):
    """Each ``train()`` of sbi makes an optimizer of its own, on the same network."""
    monkeypatch.chdir(tmp_path)
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    from p4flows import attach_on_first_step
    from p4flows.nflows import P4InvLinear, replace_permutations

    torch.manual_seed(0)
    schedulers, layers, merges = [], [], [0]

    def build(theta, x):
        estimator = posterior_nn("maf", hidden_features=8, num_transforms=2)(theta, x)
        replace_permutations(estimator)
        schedulers.append(attach_on_first_step(estimator, every=5))
        layers.extend(module for module in estimator.modules() if isinstance(module, P4InvLinear))
        return estimator

    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    inference = NPE(prior=prior, density_estimator=build)
    for _ in range(3):
        theta = torch.randn(200, 2)
        inference.append_simulations(theta, theta + 0.3 * torch.randn(200, 2))
        inference.train(max_num_epochs=5, training_batch_size=20, show_train_summary=False, force_first_round_loss=True)
        trained = [module for module in inference._neural_net.modules() if isinstance(module, P4InvLinear)]
        merges.append(int(trained[0].merges))
    print("merges after each round", merges[1:])
    assert all(b - a >= 5 for a, b in itertools.pairwise(merges))
