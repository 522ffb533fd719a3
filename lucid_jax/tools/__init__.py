"""What people use around a cache: `inspect`, the command line, benchmarks, reports, plans and plots.

Sees all of the package; of the rest, the top of the package alone imports from here.
"""

from lucid_jax.tools.inspection import assert_in_place, inspect
from lucid_jax.tools.inspection_report import Inspection
from lucid_jax.tools.targets import MissingCompiler

__all__ = ["Inspection", "MissingCompiler", "assert_in_place", "inspect"]
