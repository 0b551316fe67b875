import warnings

import pytest
import torch
from registry import N, matrix

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.precision import MixedPrecision

    from p4flows.lightning import MergeCallback

from torch import nn

from p4flows import P4Inv

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
