"""Write files that run without this library, compare them with the model, run them."""

from tokenprune.exporting.run import FORMATS, Format, format_of, open_exported
from tokenprune.exporting.write import ExportReport, export

__all__ = ["FORMATS", "ExportReport", "Format", "export", "format_of", "open_exported"]
