"""One self-contained HTML page of a run or a study."""

from abft_mlx.analysis.report.writing import Report, write_report

__all__ = ["Report", "write_report"]
