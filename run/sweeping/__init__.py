"""What `run/sweep.py` does: the sweep file, its runs, where they run, and the tables of their results."""
