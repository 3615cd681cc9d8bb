"""The parts of `run/report.py`: numbers from the answers, the model on chosen videos, figures, sections, the page."""
