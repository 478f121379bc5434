"""``gpufgbg bench``: runs the suites of ``bench/``, keeps their rows, compares and reports them.

``results`` holds rows and their file, ``runner`` runs the suites in processes of their own, ``compare`` sets two
files against each other, ``duels`` rivals and ours, ``report`` and ``plots`` draw one, ``profile`` reads the
profiler's counters of our kernels.
"""

from gpufgbg.benchmarks.results import Results, Row

__all__ = ["Results", "Row"]
