"""The audit of a filter run: statistics, findings, plots and the HTML page."""
