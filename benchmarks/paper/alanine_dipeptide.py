"""Figure 7: alanine dipeptide at the scale of Appendix H, with fixed swaps and with learned ones in their place."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.comparison import comparison
from benchmarks.harness.environment import save
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.mixes import put_between
from benchmarks.paper.boltzmann import PERTURBATION, TEMPERATURE, Samples, describe, load_data, measure
from benchmarks.paper.boltzmann_figure import draw
from benchmarks.paper.boltzmann_training import Stage, train
from benchmarks.paper.realnvp import real_nvp
from p4flows import PAPER_BOUNDS
from p4flows.nflows import replace_permutations

__all__ = ["FILES", "FULL", "KEPT", "QUICK", "Run", "add_arguments", "build", "claims", "run", "table"]

FILES = ("alanine_dipeptide.json", "alanine_dipeptide.png")
KEPT = "--checkpoints"


# Appendix H.
_MERGES = {"every": 100, "correct_every": 50, "reset": "all"}
_LIKELIHOOD = Stage(40_000, batch=256, lr=1e-3, **_MERGES)
_ENERGY = Stage(2_000, batch=4_000, lr=1e-5, energy_weight=0.05, **_MERGES)


@dataclass(frozen=True)
class Run:
    """Data, architecture, and the two stages of training of one flow. The defaults are those of Appendix H."""

    frames: int = 250_000
    couplings: int = 50
    mix: str = "reversed"  # one of mixing.mixes.MIXES
    rank: int | None = 1
    seed: int = 0
    likelihood: Stage = _LIKELIHOOD
    energy: Stage = _ENERGY
    samples: int = 50_000
    compiled: bool = True


FULL = Run()
QUARTER = replace(
    FULL,
    likelihood=replace(FULL.likelihood, steps=FULL.likelihood.steps // 4),
    energy=replace(FULL.energy, steps=FULL.energy.steps // 4),
)
QUICK = Run(
    frames=1_500,
    couplings=4,
    likelihood=replace(FULL.likelihood, steps=60, batch=64, every=10),
    energy=replace(FULL.energy, steps=3, batch=64, every=1),
    samples=200,
    compiled=False,
)
_STAGES = ("likelihood", "energy")
_PAPER = ("RealNVP", "RealNVP + P4Inv")
_FOLLOWED = {"every": 1, "correct_every": None, "reset": "momentum"}
_MIXES: dict[str, dict[str, Any]] = {
    "RealNVP": {"mix": "reversed"},
    "RealNVP + P4Inv": {"mix": "P4Inv"},
    "RealNVP + random": {"mix": "random"},
    "RealNVP + InvertibleLinear": {"mix": "InvertibleLinear", "rank": None},
}


def add_arguments(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="the settings of the paper: 5 hours on two cores")
    size.add_argument("--quarter", action="store_true", help="a quarter of the paper's steps")
    size.add_argument("--quick", action="store_true", help="a minute, to see that everything runs")
    parser.add_argument("--flows", nargs="+", choices=list(_MIXES), default=list(_MIXES), help="to train")
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time, each with one thread")
    parser.add_argument("--seed", type=int, default=0, help="of data, networks and training")


def build(setting: Run, features: int = 60) -> torch.nn.Module:
    """The flow before training."""
    torch.manual_seed(setting.seed)
    flow = real_nvp(features, setting.couplings)
    if setting.mix == "P4Inv":
        replace_permutations(flow, setting.rank, seed=setting.seed, **PAPER_BOUNDS)
        return flow
    return put_between(flow, features, setting.mix, setting.rank, setting.seed)


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    setting = replace(QUICK if args.quick else QUARTER if args.quarter else FULL, seed=args.seed)
    data = load_data(setting.frames)
    training_data, md = data.samples(data.frames), data.samples(data.test_frames)
    noise = torch.randn(data.test_frames.shape, generator=torch.Generator().manual_seed(args.seed))
    perturbed = data.samples(data.test_frames + PERTURBATION * noise)
    rows = {"MD": describe(training_data, md, data), "MD + 0.004 nm": describe(perturbed, md, data)}
    samples = {"MD": training_data, "MD + 0.004 nm": perturbed}
    settings = {name: _with(setting, **_MIXES[name]) for name in args.flows}
    for name, (stages, drawn) in train_all(settings, args.kept, args.jobs).items():
        rows[name], samples[name] = stages, drawn
    results = {"settings": {**asdict(setting), "temperature": TEMPERATURE, "jobs": args.jobs}, "rows": rows}
    results["claims"] = claims(results)
    path = save("alanine_dipeptide", results, args.out)
    flat = {name: row | row.get("energy", {}) for name, row in rows.items()}
    picture = draw(samples, flat, args.out / "alanine_dipeptide.png", ("likelihood", "energy"))
    print(f"{path}\n{picture}\n{claims_table(results)}\n\n{table(results)}")
    return results


def _with(setting: Run, mix: str, rank: int | None = 1) -> Run:
    """The same with other swaps. The paper's interval of merges is that of P4Inv."""
    merges = _FOLLOWED if mix == "InvertibleLinear" else {}
    stages = {name: replace(getattr(setting, name), **merges) for name in _STAGES}
    return replace(setting, mix=mix, rank=rank, **stages)


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What Section 4.4 says, what came out, and whether it holds; after training by energy."""
    rows = results["rows"]
    if not all(name in rows for name in _PAPER):
        return []
    fixed, learned = (rows[name]["energy"] for name in _PAPER)
    shifts = [row["energy_shift_of_median"] for row in (fixed, learned)]
    perturbed = rows["MD + 0.004 nm"]["energy_mean"] - rows["MD"]["energy_mean"]
    low = [row["low_energy_fraction"] for row in (fixed, learned)]
    both = "fixed swaps {}, P4Inv {}".format
    return [
        claim(
            "energies of the generated structures (medians) above MD",
            "≈ 2.6 kT for both",
            "< 3.5 kT for both",
            both(*(f"{shift:+.2f} kT" for shift in shifts)),
            max(shifts) < 3.5,
        ),
        claim(
            "mean energy of the data after a perturbation of 0.004 nm, above MD",
            "13 kT",
            "10 to 16 kT",
            f"{perturbed:+.1f} kT",
            10 < perturbed < 16,
        ),
        claim(
            "infeasibly large energies",
            "rarely",
            "< 5% above the highest of MD",
            both(*(f"{1 - fraction:.1%}" for fraction in low)),
            min(low) > 0.95,
        ),
        _beside_each_other(fixed, learned),
        claim(
            "inverses remain intact in training",
            "intact",
            "largest |A A⁻¹ − I| < 1e-5",
            f"{learned['residual']:.1e}; round trip {learned['round_trip']:.1e} "
            f"(fixed swaps {fixed['round_trip']:.1e})",
            learned["residual"] < 1e-5,
        ),
    ]


def _beside_each_other(fixed: dict[str, Any], learned: dict[str, Any]) -> dict[str, Any]:
    """Comparable by the likelihood, and ahead by most of the figures, of which old weights leave two."""
    ahead = [learned["nll"] < fixed["nll"], learned["ramachandran_js"] < fixed["ramachandran_js"]]
    ours = f"NLL {learned['nll'] - fixed['nll']:+.2f} nats"
    ours += f", Ramachandran JS {learned['ramachandran_js'] / fixed['ramachandran_js']:.2f} times"
    if _weighed_rightly(fixed) and _weighed_rightly(learned):
        ahead.append(learned["ess"] > fixed["ess"])
        ours += f", effective sample size {learned['ess'] / fixed['ess']:.2f} times"
    else:
        ours += ", effective sample size not known"
    comparable = abs(learned["nll"] - fixed["nll"]) < 3
    return claim(
        "the two flows beside each other",
        "comparable, slight advantages for P4Inv",
        "NLL within 3 nats; P4Inv ahead in at least 2 of NLL, JS, effective sample size",
        ours,
        comparable and sum(ahead) >= 2,
    )


def table(results: dict[str, Any]) -> str:
    """Figure 7 and more before and after training by energy, as a Markdown table."""
    columns = {}
    for name, row in results["rows"].items():
        columns |= {f"{name}, {stage}": row[stage] for stage in _STAGES} if "energy" in row else {name: row}
    wrong = () if all(map(_weighed_rightly, columns.values())) else ("reverse_kl", "ess")
    columns = {name: {key: value for key, value in row.items() if key not in wrong} for name, row in columns.items()}
    return comparison(
        columns,
        [
            ("trainable parameters", "parameters", "{:,}"),
            ("held-out NLL (nats)", "nll", "{:.2f}"),
            ("reverse KL + constant (nats)", "reverse_kl", "{:.2f}"),
            ("effective sample size", "ess", "{:.2%}"),
            ("largest weight's share", "largest_weight", "{:.1%}"),
            ("samples out of range", "rejected_fraction", "{:.1%}"),
            ("mean u(x) (kT)", "energy_mean", "{:.3g}"),
            ("median u(x) (kT)", "energy_median", "{:.2f}"),
            ("median, above MD (kT)", "energy_shift_of_median", "{:+.2f}"),
            ("mean of low energies, above MD (kT)", "energy_shift_of_low", "{:+.2f}"),
            ("low-energy fraction", "low_energy_fraction", "{:.3f}"),
            ("Ramachandran JS to MD", "ramachandran_js", "{:.4f}"),
            ("JS of φ", "phi_js", "{:.4f}"),
            ("JS of ψ", "psi_js", "{:.4f}"),
            ("JS of the 60 coordinates, mean", "marginal_js_mean", "{:.4f}"),
            ("JS of the 60 coordinates, largest", "marginal_js_max", "{:.4f}"),
            ("largest \\|x − F(F⁻¹(x))\\|", "round_trip", "{:.1e}"),
            ("largest \\|A A⁻¹ − I\\|", "residual", "{:.1e}"),
            ("largest error of ln\\|det A\\|", "logabsdet_error", "{:.1e}"),
        ],
    )


def _weighed_rightly(row: dict[str, Any]) -> bool:
    """Whether samples beyond the range of their coordinates were left out of the weights, as they were not at first."""
    return "ess" not in row or "rejected_fraction" in row


def train_all(settings: dict[str, Run], checkpoints: Path, jobs: int) -> dict[str, tuple[dict[str, Any], Samples]]:
    """Train, some at a time; for each the results after either stage, and the samples after the last."""
    with pool_of(jobs) as pool:
        running = {name: pool.submit(_train, name, setting, checkpoints) for name, setting in settings.items()}
        return {name: future.result() for name, future in running.items()}


def _train(name: str, setting: Run, checkpoints: Path) -> tuple[dict[str, Any], Samples]:
    checkpoints.mkdir(parents=True, exist_ok=True)
    data = load_data(setting.frames)
    md = data.samples(data.test_frames)
    flow = build(setting, data.z.shape[1])
    stages = {}
    for stage in _STAGES:
        plan = replace(getattr(setting, stage), seed=setting.seed)
        checkpoint = checkpoints / f"{name} {setting.seed} {stage} {plan.steps}.pt"
        training = train(flow, data, plan, f"{name}, {stage}", checkpoint, setting.compiled)
        measured, samples = measure(flow, data, md, setting.samples, setting.seed)
        stages[stage] = measured | training | {"steps": plan.steps}
    return stages, samples
