"""Files that run without this library: written, checked against the model, run."""

from tokenprune.exporting.run import FORMATS, Format, format_of, open_exported
from tokenprune.exporting.write import ExportReport, export

__all__ = ["FORMATS", "ExportReport", "Format", "export", "format_of", "open_exported"]
