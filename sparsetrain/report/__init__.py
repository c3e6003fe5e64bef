"""Reports of runs: tables, figures and the page. A page may be given further sections by `register_section`."""

from sparsetrain.report.registry import register_section

__all__ = ["register_section"]
