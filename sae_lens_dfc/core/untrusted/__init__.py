"""Checks untrusted data sets and weight files before a library reads them."""
