"""Comparisons with the libraries that people use today; never needed to run zhibei."""
