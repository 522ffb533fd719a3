"""What people use around a cache: `inspect`, the command line, benchmarks, reports, plans and plots.

Sees all of the package; of the rest, the top of the package alone imports from here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lucid_jax.tools.inspection import assert_in_place, inspect
    from lucid_jax.tools.inspection_report import Inspection
    from lucid_jax.tools.targets import MissingCompiler

__all__ = ["Inspection", "MissingCompiler", "assert_in_place", "inspect"]


def __getattr__(name: str) -> Any:
    """What reads compiled programs is imported when it is asked for, not by `import lucid_jax`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lucid_jax.tools import inspection

    return getattr(inspection, name)
