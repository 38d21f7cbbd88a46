"""Trunk -> Segments: find where the graph can be cut, choose the cuts, and split it there."""
