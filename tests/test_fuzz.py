"""Wrong arguments of every public constructor and function: a ValueError or TypeError that names the argument."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import p4flows
from p4flows import (
    BentIdentity,
    Inverse,
    InvertibleLinear,
    MergeScheduler,
    P4Conv2d,
    P4Inv,
    P4InvStack,
    P4Linear,
    P4Lipschitz,
    P4Orthogonal,
)
from p4flows.testing import check_perturbation

JUNK = [
    *(
        None,
        True,
        -1,
        0,
        1.5,
        math.nan,
        math.inf,
        10**30,
        "",
        "nonsense",
        b"x",
        (),
        [],
        {},
        (1, 2, 3),
        (2, 1),
        object(),
    ),
    *(int, nn.Linear(2, 2), torch.float32, torch.int64, torch.complex64, torch.device("meta"), np.float64(0.5)),
    *(torch.zeros(()), torch.zeros(2, 2), torch.ones(3, 3) * 1j, torch.full((3, 3), torch.nan), torch.eye(3).bool()),
    *(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.empty(0), torch.eye(3, device="meta"), np.zeros((3, 3))),
]


def layer_and_optimizer():
    layer = P4Inv(3)
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


def scheduler(**arguments):
    layer, optimizer = layer_and_optimizer()
    return MergeScheduler(**{"model": layer, "optimizer": optimizer} | arguments)


LAYER = {
    **{"features": 3, "rank": 1, "bias": True, "init": "reverse", "seed": 0, "bounds_update": (-6.0, None)},
    **{"bounds_det": (-2.5, 15.5), "bounds_penalty": (None, 15.0), "penalty_weight": 0.1, "device": "cpu"},
    "dtype": torch.float32,
}
CONVOLUTION = {"in_channels": 2, "out_channels": 4, "kernel_size": 3}
CALLS = {
    "P4Inv": (P4Inv, LAYER),
    "InvertibleLinear": (
        InvertibleLinear,
        {name: value for name, value in LAYER.items() if name not in ("bounds_penalty", "penalty_weight")},
    ),
    "P4Orthogonal": (
        P4Orthogonal,
        {name: value for name, value in LAYER.items() if not name.startswith(("bounds", "penalty"))},
    ),
    "P4Lipschitz": (
        P4Lipschitz,
        {
            **{"in_features": 3, "out_features": 2, "bound": 0.5, "rank": 1, "bias": True, "seed": 0, "device": "cpu"},
            "dtype": torch.float32,
        },
    ),
    "check_perturbation": (
        check_perturbation,
        {
            **{"constructor": lambda: P4Linear(3, 2), "example": torch.ones(2, 3), "steps": 1, "scale": 0.1},
            **{"tolerance": 1e-3, "only": ["groups"], "skip": ["devices"]},
        },
    ),
    "P4InvStack": (P4InvStack, {**LAYER, "depth": 3, "models": 2, "activations": [BentIdentity()]}),
    "P4Linear": (
        P4Linear,
        {
            **{"in_features": 3, "out_features": 2, "rank": 1, "bias": True, "seed": 0, "device": "cpu"},
            "dtype": torch.float32,
        },
    ),
    "from_layers": (P4InvStack.from_layers, {"layers": [P4Inv(3), P4Inv(3)], "activations": [BentIdentity()]}),
    "Inverse": (Inverse, {"bijection": BentIdentity()}),
    "MergeScheduler": (
        scheduler,
        {
            **dict(zip(("model", "optimizer"), layer_and_optimizer(), strict=True)),
            **{"every": 10, "force_every": 10, "correct_every": 50, "reset": "all", "add_penalty": False},
        },
    ),
    "attach_on_first_step": (p4flows.attach_on_first_step, {"model": P4Inv(3), "every": 10, "reset": "v"}),
    "AveragedModel": (p4flows.AveragedModel, {"model": P4Inv(3)}),
    "forward": (lambda input: P4Inv(3)(input), {"input": torch.ones(2, 3)}),
    "inverse": (lambda input: P4Inv(3).inverse(input), {"input": torch.ones(2, 3)}),
    "stack": (lambda input: P4InvStack(3, 2)(input), {"input": torch.ones(2, 3)}),
    "dense": (lambda input: InvertibleLinear(3)(input), {"input": torch.ones(2, 3)}),
    "dense inverse": (lambda input: InvertibleLinear(3).inverse(input), {"input": torch.ones(2, 3)}),
    "activation": (lambda input: BentIdentity()(input), {"input": torch.ones(2, 3)}),
    "activation inverse": (lambda input: Inverse(BentIdentity())(input), {"input": torch.ones(2, 3)}),
    "P4Conv2d": (P4Conv2d, {"rank": 1, "seed": 0, "bias": True, "dtype": torch.float32, **CONVOLUTION}),
    "report": (p4flows.report, {"model": P4Inv(3)}),
    "from_linear": (P4Linear.from_linear, {"layer": nn.Linear(3, 2), "rank": 1, "seed": 0}),
    "correct": (P4Inv(3).correct, {"order": 7}),
    "set_matrix": (P4Inv(3).set_matrix, {"M": torch.eye(3)}),
    "set_matrix of dense": (InvertibleLinear(3).set_matrix, {"M": torch.eye(3)}),
    "set_matrix of orthogonal": (P4Orthogonal(3).set_matrix, {"M": torch.eye(3)}),
    "set_matrix of Lipschitz": (P4Lipschitz(3, 3).set_matrix, {"M": torch.eye(3) / 2}),
}
try:
    from p4flows.molecules import (
        MixedCoordinates,
        OpenMMEnergy,
        alanine_dipeptide,
        clear_cache,
        importance_weights,
        load_trajectory,
        regularize_energy,
        simulate,
    )
except ImportError:
    pass
else:
    MOLECULE = alanine_dipeptide()
    FRAMES = torch.tensor(MOLECULE.positions) + 0.01 * torch.randn(
        80, 22, 3, generator=torch.Generator().manual_seed(0)
    )
    ENERGY = OpenMMEnergy(MOLECULE.system, 600.0)
    PROLINE = Path(__file__).parent / "data" / "molecules" / "proline_dipeptide.pdb"
    CALLS |= {
        "OpenMMEnergy": (
            OpenMMEnergy,
            {
                **{"system": MOLECULE.system, "temperature": 600.0, "platform": "Reference", "workers": 0},
                **{"timeout": 10.0, "e_high": 10.0, "e_max": 1e6},
            },
        ),
        "energy": (ENERGY, {"positions": FRAMES[:2]}),
        "importance_weights": (
            importance_weights,
            {name: torch.zeros(3) for name in ("log_q", "energy", "logabsdet")} | {"in_range": torch.ones(3).bool()},
        ),
        "load_trajectory": (load_trajectory, {"source": np.array(FRAMES), "molecule": MOLECULE}),
        "from_openmm": (
            p4flows.molecules.Molecule.from_openmm,
            {
                **{"topology": MOLECULE.topology, "system": MOLECULE.system, "positions": MOLECULE.positions},
                **{"z_matrix": MOLECULE.z_matrix, "rigid_block": MOLECULE.rigid_block},
            },
        ),
        "from_pdb": (p4flows.molecules.Molecule.from_pdb, {"path": PROLINE, "forcefield": "amber14-all.xml"}),
        "clear_cache": (clear_cache, {"keys": []}),
        "regularize_energy": (regularize_energy, {"u": torch.ones(2), "e_high": 10.0, "e_max": 1e6}),
        "MixedCoordinates": (
            MixedCoordinates,
            {"z_matrix": MOLECULE.z_matrix, "rigid_block": MOLECULE.rigid_block, "data": FRAMES},
        ),
        "simulate": (
            simulate,
            {
                **{"system": MOLECULE, "temperature": 600.0, "frames": 1, "stride": 1, "seed": 0, "workers": 1},
                **{"positions": MOLECULE.positions, "equilibration": 0, "progress": False},
            },
        ),
    }
try:
    from nflows.transforms import CompositeTransform, ReversePermutation

    import p4flows.nflows
except ImportError:
    pass
else:

    def replace(**more):
        return p4flows.nflows.replace_permutations(CompositeTransform([ReversePermutation(3)]), **more)

    CALLS["replace_permutations"] = replace, {"rank": 1, "linear": True, "example": torch.ones(2, 3), "seed": 0}
    CALLS["replace_permutations in"] = p4flows.nflows.replace_permutations, {"flow_or_transform": None}
try:
    from p4flows.lightning import MergeCallback
except ImportError:
    pass
else:
    CALLS["MergeCallback"] = MergeCallback, {"every": 10, "correct_every": 50, "reset": "v", "add_penalty": False}
try:
    import bgflow

    import p4flows.bgflow
except ImportError:
    pass
else:

    def swaps(**more):
        flow = bgflow.SequentialFlow([bgflow.SplitFlow(2), bgflow.SwapFlow(), bgflow.MergeFlow(1)])
        return p4flows.bgflow.replace_swaps(flow, **{"example": torch.ones(2, 3)} | more)

    CALLS |= {
        "P4InvSwap": (p4flows.bgflow.P4InvSwap, {"dim0": 1, "dim1": 2, "rank": 1, "init": "swap", "seed": 0}),
        "replace_swaps in": (lambda flow: p4flows.bgflow.replace_swaps(flow, torch.ones(2, 2)), {"flow": None}),
        "replace_swaps": (swaps, {"example": torch.ones(2, 3), "init": "swap", "rank": 1, "seed": 0}),
        "from_pppp": (p4flows.bgflow.from_pppp, {"layer": None}),
        "to_pppp": (p4flows.bgflow.to_pppp, {"layer": None}),
        "as_bgflow_energy": (p4flows.bgflow.as_bgflow_energy, {"energy": None}),
    }

try:
    import normflows

    import p4flows.normflows
except ImportError:
    pass
else:

    def normflows_swaps(**more):
        return p4flows.normflows.replace_permutations(nn.ModuleList([normflows.flows.Permute(3)]), **more)

    CALLS["normflows"] = normflows_swaps, {"rank": 1, "linear": True, "seed": 0, "layer": P4Inv, "bias": True}
    CALLS["normflows in"] = p4flows.normflows.replace_permutations, {"model": None}
try:
    import zuko

    import p4flows.zuko
except ImportError:
    pass
else:
    OPTIONS = {"rank": 1, "seed": 0, "layer": P4Inv, "bias": True}
    CALLS["insert_linear"] = lambda **more: p4flows.zuko.insert_linear(zuko.flows.NICE(3), **more), OPTIONS
    CALLS["insert_linear in"] = p4flows.zuko.insert_linear, {"flow": None}
    CALLS["zuko in"] = p4flows.zuko.replace_permutations, {"flow": None}

RUNS = [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments]


@pytest.mark.filterwarnings("ignore:MergeScheduler has nothing", "ignore:(replace|insert)_.* found no")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:applying swapping on a single")  # of bgflow
@pytest.mark.parametrize(("name", "argument"), RUNS, ids=[f"{name}-{argument}" for name, argument in RUNS])
def test_wrong_arguments(name, argument, tmp_path, monkeypatch):
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path))
    call, arguments = CALLS[name]
    for value in JUNK:
        given = {**arguments, argument: value}
        if name == "simulate" and value is not None and type(value) in (int, bool) and value > 0:
            continue  # a valid one, and a simulation
        try:
            result = call(**given)
        except Exception as error:
            if not isinstance(error, ValueError | TypeError) or argument not in str(error):
                pytest.fail(f"{argument}={value!r} raised {type(error).__name__}: {error}")
        else:
            kinds = P4Inv | InvertibleLinear | P4InvStack | P4Linear | P4Orthogonal | P4Lipschitz
            if isinstance(result, kinds) and not result.A.is_meta:
                assert all(T.isfinite().all() for T in result.state_dict().values()), repr(value)
