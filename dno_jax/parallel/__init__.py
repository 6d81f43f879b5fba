"""Meshes, layouts and the few things that several processes must agree on."""
