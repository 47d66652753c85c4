"""From a run's `Summary` to one HTML page that needs no network. Imports no torch."""

from __future__ import annotations

from palimpsest.report.page import write_report

__all__ = ["write_report"]
