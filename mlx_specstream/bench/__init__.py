"""Measuring: what a step costs and what it gives. Timings are ratios taken in one run, interleaved."""
