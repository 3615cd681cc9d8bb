"""Modules of `run/report.py`: numbers, replayed videos, figures, sections and the page."""
