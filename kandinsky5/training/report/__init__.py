"""The report of a run as one HTML file: read from what the run left in its output folder."""
