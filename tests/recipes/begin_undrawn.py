"""Imported by what is forked: its forks leave figures undrawn."""

from undrawn import leave_figures

leave_figures(setattr)
