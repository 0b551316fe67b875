"""Reduced potential energies of molecules from OpenMM, differentiable in torch."""

from __future__ import annotations

import math
import os
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from p4flows.checks import choice, integer, number
from p4flows.molecules.evaluation import WorkerPool
from p4flows.molecules.evaluator import Evaluator
from p4flows.molecules.molecule import Molecule
from p4flows.molecules.ownership import Deadline, Owner
from p4flows.molecules.regularization import ordered, regularize_energy
from p4flows.molecules.tasks import TaskPool
from p4flows.molecules.units import in_unit, positions_tensor

__all__ = ["OpenMMEnergy"]

_GAS_CONSTANT = 8.31446261815324e-3  # kJ/mol/K


class OpenMMEnergy:
    r"""Reduced energy ``u(x) = U(x) / kT`` of an OpenMM system, with gradient ``-F(x) / kT``.

    Args:
        system: an ``openmm.System``, or a :class:`Molecule` for its system. Virtual sites are placed by their parent
            atoms, whatever positions are given for them, and get the gradient zero; constraints do not enter into
            the energy.
        temperature: T in kelvin, or with a unit of OpenMM: ``300 * kelvin``.
        platform: OpenMM platform. "Reference" is the fastest for some tens of atoms.
        workers: number of spawned processes that share each batch; 0 evaluates in this process. A script that uses
            workers needs the usual ``if __name__ == "__main__":``. With an executor, the number of tasks that each
            batch is cut into; 0 for tasks of 256 structures.
        timeout: seconds that a call may wait, all its waits together: for other threads that use this energy, for
            workers to start, and for their answers. None for no limit.
        e_high, e_max: optional regularisation of high energies in kT, see :func:`regularize_energy`. Both or neither.
        executor: a ``concurrent.futures.Executor`` that evaluates batches in tasks, instead of workers: that of
            dask.distributed, ``Client.get_executor()``, or of mpi4py.futures, for other machines. It remains the
            caller's, to shut down as well. A process that is lost is an error, unless the engine repeats its tasks.

    Call it with positions in nm, (..., n_atoms, 3) or (..., 3 n_atoms); the energies in kT are (...), in the dtype and
    on the device of the positions. NumPy arrays and OpenMM's own positions, with units or as lists of ``Vec3``, are
    converted to tensors. Not twice differentiable.

    Positions or energies that are NaN or infinite give an energy of +inf (the cap, if regularised) and zero gradient;
    :attr:`invalid` counts them. Any other trouble is raised: an energy is never made up.

    Use it as a context manager, or call :meth:`close`, to end the workers; after an error in one, the next call
    starts new ones.

    Threads may share it: each call has the context, or the workers, for itself, and the others wait. For more than
    one core, use workers. A forked process may go on using it, and makes a context or workers of its own.

    Raises:
        ValueError: for wrong arguments, and positions of another atom count.
        RuntimeError: for an error in a worker, the death of one, or a wait longer than ``timeout``.
    """

    def __init__(
        self,
        system: openmm.System | Molecule,
        temperature: float,
        platform: str = "Reference",
        workers: int = 0,
        timeout: float | None = 600.0,
        e_high: float | None = None,
        e_max: float | None = None,
        *,
        executor: Executor | None = None,
    ) -> None:
        if isinstance(system, Molecule):
            system = system.system
        if not isinstance(system, openmm.System):
            raise ValueError(f"system: expected an openmm.System or a Molecule, got {type(system).__name__}")
        names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
        if (e_high is None) != (e_max is None):
            raise ValueError(f"e_high and e_max: expected both or neither, got {e_high!r} and {e_max!r}")
        if e_high is not None and e_max is not None:
            e_high, e_max = ordered(e_high, e_max)
        self.n_atoms = system.getNumParticles()
        self.temperature = number("temperature", in_unit("temperature", temperature, unit.kelvin), 0, strict=True)
        self.platform = choice("platform", platform, names)
        self.workers = integer("workers", workers, 0)
        timeout = in_unit("timeout", timeout, unit.second)
        self.timeout = None if timeout is None else number("timeout", timeout, 0, strict=True)
        if executor is not None and not isinstance(executor, Executor):
            raise ValueError(f"executor: expected a concurrent.futures.Executor, got {type(executor).__name__}")
        self.executor, self._pid = executor, os.getpid()
        self.e_high, self.e_max = e_high, e_max
        self.invalid = 0
        self._system_xml = openmm.XmlSerializer.serialize(system)
        self._own()

    def _own(self) -> None:
        # Not a bound method: in a cycle, workers would outlive the energy until the next collection.
        arguments = self.executor, self._pid, self.workers, self._system_xml, self.platform, self.n_atoms
        self._owner = Owner(partial(_make, *arguments))

    @property
    def _pool(self) -> WorkerPool | None:
        resource = self._owner.resource
        return resource if isinstance(resource, WorkerPool) else None

    @property
    def kT(self) -> float:
        """kT in kJ/mol."""
        return _GAS_CONSTANT * self.temperature

    def __call__(self, positions: Tensor) -> Tensor:
        """u(x), (...), for positions (..., n_atoms, 3) or (..., 3 n_atoms) in nm."""
        n = self.n_atoms
        positions = positions_tensor("positions", positions)
        if not isinstance(positions, Tensor) or not positions.is_floating_point():
            kind = getattr(positions, "dtype", type(positions).__name__)
            raise ValueError(f"positions: expected a floating-point tensor, got {kind}")
        if positions.shape[-2:] == (n, 3):
            batch = positions.shape[:-2]
        elif positions.shape[-1:] == (3 * n,):
            batch = positions.shape[:-1]
        else:
            raise ValueError(
                f"positions: expected (..., {n}, 3) or (..., {3 * n}) for {n} atoms, got {tuple(positions.shape)}"
            )
        energies = _Evaluate.apply(positions.reshape(math.prod(batch), 3 * n), self).reshape(batch)
        if self.e_high is None or self.e_max is None:
            return energies
        return regularize_energy(energies, self.e_high, self.e_max)

    def _evaluate(self, positions: np.ndarray, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Reduced energies (B,) and their gradient (B, n, 3) for float64 positions (B, n, 3)."""
        finite = np.isfinite(positions).all((1, 2))
        energies = np.full(len(positions), np.inf)
        gradient = np.zeros(positions.shape) if forces else None
        if finite.any():
            potential = np.empty(finite.sum())
            force = np.empty((len(potential), *positions.shape[1:])) if forces else None
            self._compute(np.ascontiguousarray(positions[finite]), potential, force)
            energies[finite] = potential / self.kT
            if gradient is not None and force is not None:
                gradient[finite] = force / -self.kT
        valid = np.isfinite(energies)
        if gradient is not None:
            valid &= np.isfinite(gradient).all((1, 2))
            gradient[~valid] = 0
        energies[~valid] = np.inf
        if not valid.all():
            with self._owner.exclusive(Deadline(self.timeout)):
                self.invalid += int((~valid).sum())
        return energies, gradient

    def _compute(self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None) -> None:
        deadline = Deadline(self.timeout)
        with self._owner.borrow(deadline) as resource:
            if isinstance(resource, WorkerPool | TaskPool):
                resource(positions, energies, forces, deadline)
            else:
                resource(positions, energies, forces)

    def close(self) -> None:
        """End the worker processes, when no other thread uses them; the next call starts new ones."""
        self._owner.close(Deadline(self.timeout))

    def __enter__(self) -> OpenMMEnergy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if self.executor is not None:
            raise TypeError("an OpenMMEnergy with an executor cannot be copied or sent to another process")
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own()


def _make(
    executor: Executor | None, pid: int, workers: int, system_xml: str, platform: str, n_atoms: int
) -> Evaluator | WorkerPool | TaskPool:
    if executor is not None:
        return TaskPool(executor, workers, system_xml, platform, pid)
    return WorkerPool(workers, system_xml, platform, n_atoms) if workers else Evaluator(system_xml, platform)


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, energy: OpenMMEnergy) -> Tensor:
        x = positions.detach().cpu().double().numpy().reshape(len(positions), energy.n_atoms, 3)
        energies, gradient = energy._evaluate(x, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(torch.from_numpy(gradient.reshape(positions.shape)).to(positions))
        return torch.from_numpy(energies).to(positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # Where the gradient is zero by definition, an infinite incoming one must not make it NaN.
        return torch.where(gradient == 0, 0, grad[:, None] * gradient), None
