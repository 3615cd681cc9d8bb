"""Sweeps: the sweep file, its runs, where they run, the tables of their results, and searches."""
