"""Measures of distortion and rate, rate-distortion curves, BD-rate, plots, and classical codecs to compare with.

The libraries behind them come with `pip install "zarr-cae[compare]"` and are imported when they are first used.
"""
