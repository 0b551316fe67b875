import warnings

import pytest
import torch
from registry import N, matrix

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
    from lightning.pytorch.plugins.precision import MixedPrecision

    from p4flows.lightning import MergeCallback

from torch import nn

from p4flows import InvertibleLinear, MergeScheduler, P4Inv

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningModule):
    def __init__(self, overflow_at=()):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([P4Inv(N, seed=1), P4Inv(N, rank=2, seed=2)])
        self.overflow_at = overflow_at

    def training_step(self, batch, index):
        x, total = batch[0], 0
        for layer in self.layers:
            x, logabsdet = layer(x)
            total = total + logabsdet
        loss = (x.square().sum(-1) / 2 - total).mean()
        return loss * torch.inf if index in self.overflow_at else loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def data():
    x = torch.randn(96, N, generator=torch.Generator().manual_seed(3)) @ matrix(N).float()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)  # 12 batches


def fit(module, callback, epochs, folder, checkpoint=None, **options):
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,
    )
    trainer.fit(module, data(), ckpt_path=checkpoint)
    return trainer


def test_merges_every_nth_optimizer_step(tmp_path):
    module, callback = Module(), MergeCallback(every=5)
    fit(module, callback, 2, tmp_path)
    assert callback.scheduler.steps == 24
    assert [int(layer.merges) for layer in module.layers] == [4, 4]
    module.layers[0](torch.randn(2, N))[0].sum().backward()
    callback.scheduler.optimizer.step()
    assert callback.scheduler.steps == 24  # detached


def test_counts_optimizer_steps_under_gradient_accumulation(tmp_path):
    module, callback = Module(), MergeCallback(every=2)
    fit(module, callback, 2, tmp_path, accumulate_grad_batches=3)
    assert callback.scheduler.steps == 8
    assert [int(layer.merges) for layer in module.layers] == [4, 4]


def test_a_step_that_mixed_precision_skips_is_none(tmp_path):
    module, callback = Module(overflow_at=(2, 3)), MergeCallback(every=1, reset="none")
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    fit(module, callback, 1, tmp_path, plugins=[precision])
    (taken,) = {int(state["step"]) for state in callback.scheduler.optimizer.state.values()}
    assert callback.scheduler.steps == taken
    assert 4 <= taken <= 10  # the scaler may skip more on its way to a scale that fits
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_resumed_run_merges_as_one_that_was_never_stopped(tmp_path):
    whole, callback = Module(), MergeCallback(every=5, force_every=2, correct_every=3)
    fit(whole, callback, 4, tmp_path)
    first = Module()
    trainer = fit(first, MergeCallback(every=5, force_every=2, correct_every=3), 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed = Module(), MergeCallback(every=5, force_every=2, correct_every=3)
    fit(second, resumed, 4, tmp_path, checkpoint=tmp_path / "half.ckpt")
    assert resumed.scheduler.state_dict() == callback.scheduler.state_dict()
    assert resumed.scheduler.steps == 48
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_without_the_perturbations_is_an_error(tmp_path):
    class Wrong(Module):
        def configure_optimizers(self):
            return torch.optim.Adam(self.layers[0].parameters())

    with pytest.raises(ValueError, match=r"lacks that of 'layers.1'"):
        fit(Wrong(), MergeCallback(), 1, tmp_path)


def test_the_interval_may_be_given_by_position_or_left_to_the_layers(tmp_path):
    module, callback = Module(), MergeCallback(4)
    fit(module, callback, 1, tmp_path)
    assert [int(layer.merges) for layer in module.layers] == [3, 3]
    module, callback = Module(), MergeCallback()
    module.layers.append(InvertibleLinear(N))
    fit(module, callback, 2, tmp_path)
    assert [int(layer.merges) for layer in module.layers[:2]] == [2, 2]
    assert module.layers[2].lag < 0.02
    assert callback.scheduler.rounds == 24
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        MergeCallback(0)


class TwoOptimizers(Module):
    """The second one steps only in every third batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(1, 1)

    def configure_optimizers(self):
        first, second = self.layers
        return [
            torch.optim.SGD(self.other.parameters(), lr=1e-2),
            torch.optim.Adam(first.parameters(), lr=1e-2),
            torch.optim.Adam(second.parameters(), lr=1e-2),
        ]

    def training_step(self, batch, index):
        _, *optimizers = self.optimizers()
        for layer, optimizer in zip(self.layers, optimizers, strict=True):
            if index % 3 == 0 or layer is self.layers[0]:
                optimizer.zero_grad()
                x, logabsdet = layer(batch[0])
                self.manual_backward((x.square().sum(-1) / 2 - logabsdet).mean())
                optimizer.step()


def test_several_optimizers_and_a_resumed_run(tmp_path):
    whole, callback = TwoOptimizers(), MergeCallback(5, force_every=2)
    fit(whole, callback, 4, tmp_path)
    assert [int(layer.merges) for layer in whole.layers] == [9, 3]  # of 48 and 16 steps
    first = TwoOptimizers()
    trainer = fit(first, MergeCallback(5, force_every=2), 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed = TwoOptimizers(), MergeCallback(5, force_every=2)
    fit(second, resumed, 4, tmp_path, checkpoint=tmp_path / "half.ckpt")
    assert resumed.scheduler.state_dict() == callback.scheduler.state_dict()
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_layers_that_are_unfrozen_later_are_merged(tmp_path):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.layers)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.layers, optimizer)

    class Head(Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 1)

        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.head(batch[0][:, :1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-3)

    module, callback = Head(), MergeCallback(2)
    trainer = Trainer(
        max_epochs=3,
        callbacks=[Unfreeze(), callback],
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data())
    assert [int(layer.merges) for layer in module.layers] == [12, 12]


def test_the_penalty_reaches_the_closures_of_lightning(tmp_path):
    changes = []
    for add_penalty in (False, True):
        module = Module()
        module.layers[0].bounds_det = (-2.5, 15.5)
        module.layers[0].logabsdet_A.fill_(-6.0)
        fit(module, MergeCallback(100, add_penalty=add_penalty), 1, tmp_path, limit_train_batches=1)
        changes.append(module.layers[0].U.grad.clone())
    module = Module()
    module.layers[0].bounds_det = (-2.5, 15.5)
    module.layers[0].logabsdet_A.fill_(-6.0)
    expected = torch.autograd.grad(module.layers[0].penalty(), module.layers[0].U)[0]
    torch.testing.assert_close(changes[1] - changes[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("average", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_single_parameters_are_refused(tmp_path, average):
    if average == "StochasticWeightAveraging":
        average = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    else:
        average = getattr(pytest.importorskip("lightning.pytorch.callbacks"), average, None)
        if average is None:
            pytest.skip("of later versions of Lightning")
        average = average()
    trainer = Trainer(
        max_epochs=3,
        callbacks=[average, MergeCallback(2)],
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match=r"use p4flows.AveragedModel"):
        trainer.fit(Module(), data())


def test_a_training_that_breaks_off_leaves_no_scheduler_behind(tmp_path):
    class Breaking(Module):
        breaks = True

        def training_step(self, batch, index):
            if index == 5 and self.breaks:
                self.breaks = False
                raise RuntimeError("broken off")
            return super().training_step(batch, index)

    module, first, second = Breaking(), MergeCallback(1), MergeCallback(1)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(module, first, 1, tmp_path)
    assert not first.scheduler.attached
    fit(module, second, 1, tmp_path)
    assert [int(layer.merges) for layer in module.layers] == [5 + 12, 5 + 12]


def test_a_scheduler_may_be_given_an_optimizer_of_lightning(tmp_path):
    class ByHand(Module):
        automatic_optimization = False

        def on_train_start(self):
            self.scheduler = MergeScheduler(self, self.optimizers(), every=3).attach()

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    module = ByHand()
    fit(module, Callback(), 1, tmp_path)
    assert [int(layer.merges) for layer in module.layers] == [4, 4]
