"""Grids of runs: one configuration under several settings and seeds, and a table that compares them.

A grid's YAML file comes in; a run folder for each cell, results.json, table.md, report.png and report.html go out.
Cells are ordinary runs of `fastrm train` in processes of their own, and a grid goes on where it was stopped.
Open `grid.py` first, which says what a grid is, then `command.py`, which runs one.
"""
