"""Sampling: how tokens are drawn, and the program that draws whole responses."""
