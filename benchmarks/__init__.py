"""Measurements. ``python -m benchmarks`` lists them, ``python -m benchmarks NAME ...`` runs some, ``all`` runs all.

Each module defines ``run(bench: Bench, *, quick: bool) -> None`` and says what it measures in its
docstring's first line. Results go to ``out/benchmarks/NAME.json``.
"""
