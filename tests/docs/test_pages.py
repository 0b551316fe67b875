"""docs/ and README.md: their programs run, their links lead somewhere, and the reference has every public name."""

import contextlib
import importlib
import importlib.util
import io
import re
import warnings

import pytest
import torch
from pages import NEEDS, PAGES, ROOT, blocks, name_of, path_of, without_progress

from benchmarks.harness import readme
from p4flows.installing import REPOSITORY

MODULES = ("", "nflows", "bgflow", "normflows", "zuko", "lightning", "molecules", "testing")
ELSEWHERE = {"molecule"}  # tested in tests/molecules


def run(code, namespace, where):
    """Run a program; what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, where, "exec"), namespace)
    return output.getvalue()


def require(packages):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in packages:
            pytest.importorskip(package, reason=f"{package} is not installed")


# --- programs -------------------------------------------------------------------------------------------------------


def test_every_page_with_a_program_is_run():
    assert {name_of(path) for path in PAGES if blocks(path.read_text())} == set(NEEDS) | ELSEWHERE


@pytest.mark.filterwarnings("ignore")  # of the frameworks
@pytest.mark.parametrize("page", NEEDS)
def test_the_programs_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    require(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    path = path_of(page)
    namespace = {"__name__": "__main__"}
    for code, expected in blocks(path.read_text()):
        printed = without_progress(page, run(code, namespace, path.name))
        if expected is not None or printed:
            assert printed == expected


def prepare_bgflow():
    import p4flows.bgflow  # noqa: F401
    from p4flows import MergeScheduler

    bg = importlib.import_module("bgflow")
    flow = bg.SequentialFlow([bg.SplitFlow(2, 2), bg.SwapFlow(), bg.InverseFlow(bg.SplitFlow(2, 2))])
    return {"flow": flow, "x": torch.randn(4, 4), "torch": torch, "MergeScheduler": MergeScheduler}


def prepare_lightning():
    from functools import partial

    from lightning.pytorch import LightningModule, Trainer

    from p4flows import P4Inv

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = P4Inv(4)

        def training_step(self, batch, index):
            z, logabsdet = self.layer(batch)
            return (z.square().sum(-1) / 2 - logabsdet).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = partial(Trainer, accelerator="cpu", **dict.fromkeys(silent, False))
    return {"Trainer": trainer, "module": Module(), "loader": torch.utils.data.DataLoader(torch.randn(64, 4), 8)}


def prepare_sbi():
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    from p4flows import attach_on_first_step
    from p4flows.nflows import replace_permutations

    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    names = {"NPE": NPE, "posterior_nn": posterior_nn, "attach_on_first_step": attach_on_first_step, "prior": prior}
    return {**names, "replace_permutations": replace_permutations}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("framework", ["bgflow", "lightning", "sbi"])
def test_the_few_lines_of_the_readme_train(framework, monkeypatch, tmp_path):
    require([framework])
    monkeypatch.chdir(tmp_path)
    prepare = {"bgflow": prepare_bgflow, "lightning": prepare_lightning, "sbi": prepare_sbi}[framework]
    codes = [code for code, _ in blocks(readme.README.read_text())]
    (code,) = (
        code
        for code in codes
        if {"bgflow": "replace_swaps", "lightning": "MergeCallback", "sbi": "NPE"}[framework] in code
    )
    namespace = prepare()
    run(code, namespace, "README.md")
    if framework == "bgflow":
        (layer,) = (module for module in namespace["flow"].modules() if hasattr(module, "merge_every"))
        for _ in range(10):
            namespace["flow"](namespace["x"])[0].square().sum().backward()
            namespace["optimizer"].step()
        assert layer.merges == 1
    elif framework == "lightning":
        assert namespace["trainer"].callbacks[0].scheduler.counters["merged"] == 1
    else:
        inference, theta = namespace["inference"], torch.randn(100, 2)
        inference.append_simulations(theta, theta + torch.randn(100, 2))
        estimator = inference.train(max_num_epochs=12, training_batch_size=50, show_train_summary=False)
        assert max(module.merges for module in estimator.modules() if hasattr(module, "merge_every")) >= 1


# --- texts ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_one_page():
    assert len(readme.README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", [readme.README, *PAGES], ids=lambda path: path.stem)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        if name.startswith(("tutorials/", "../tutorials/")):  # where the site has the notebooks
            name = re.sub(r"^(\.\./)?tutorials", str(ROOT / "notebooks"), name)
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    require([module] if module in ("nflows", "bgflow", "normflows", "zuko", "lightning") else [])
    require(["openmm"] if module == "molecules" else [])
    public = importlib.import_module(f"p4flows.{module}".rstrip("."))
    text = (ROOT / "docs" / "reference" / f"{module or 'p4flows'}.md").read_text()
    listed = {
        name for table in re.findall(r"autosummary::\n(.*?)\n(?=\S|$)", text, re.DOTALL) for name in table.split()
    }
    documented, data = (set(re.findall(rf"^\.\. {kind}:: (\w+)$", text, re.MULTILINE)) for kind in (r"auto\w+", "data"))
    assert documented | data == set(public.__all__)
    assert listed - {":nosignatures:"} == documented


def test_every_public_module_has_a_page():
    """A module is public that the documentation of the package names; that of the contract is the page of it."""
    import p4flows

    named = set(re.findall(r":mod:`p4flows\.(\w+)`", p4flows.__doc__)) - {"perturbation"}
    assert named <= set(MODULES)
    assert {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} == {"p4flows", *MODULES} - {""}


@pytest.mark.parametrize("path", [readme.README, *PAGES], ids=lambda path: path.stem)
def test_the_address_is_that_of_the_repository(path):
    installs = re.findall(r"p4flows(?:\[\w+\])? @ git\+([^\s'\"]+)", path.read_text())
    assert set(installs) <= {REPOSITORY}
