"""What was measured, shown: intervals, tables, plots and one HTML page that needs no other file."""

from exapt.report.intervals import Decomposition, Interval, accuracy, compare, confusion, decompose
from exapt.report.measure import PeakMemory, digest
from exapt.report.page import Page
from exapt.report.table import show

__all__ = ["Decomposition", "Interval", "Page", "PeakMemory", "accuracy", "compare", "confusion", "decompose", "digest", "show"]
