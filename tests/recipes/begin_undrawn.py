"""Imported by what is forked: its forks leave figures undrawn, and know what is installed."""

from undrawn import leave_figures

from pretraining.reporting import versions

leave_figures(setattr)
versions()
