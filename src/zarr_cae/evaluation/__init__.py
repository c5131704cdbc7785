"""Measures of quality and rate, curves, plots, and classical codecs to compare with."""
