"""Commands that measure: ``python -m benchmarks NAME``. Results go to ``benchmarks/results``."""
