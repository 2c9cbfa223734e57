"""The report: what runs left on disk, as one self-contained HTML page."""

from __future__ import annotations

from leap_serve.report.page import write_report

__all__ = ["write_report"]
