"""What people use around a cache: the command line, benchmarks, comparisons, reports, plans and plots.

Sees all of the package; nothing else in it imports anything of this.
"""
