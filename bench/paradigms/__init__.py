"""Rows for the comparison of paradigms: direct rewards, critics and judges."""
