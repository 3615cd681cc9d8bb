"""Sweeps: the sweep file, its runs, the machines, the result tables, and searches."""
