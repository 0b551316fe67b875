"""A test for implementations of the P4 contract, whoever wrote them."""

from p4flows.testing.harness import CHECKS, check_perturbation

__all__ = ["CHECKS", "check_perturbation"]
