"""Reports of runs: tables, figures and the HTML page, to which `register_section` adds sections."""

from sparsetrain.report.registry import register_section

__all__ = ["register_section"]
