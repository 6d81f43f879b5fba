"""Manifests for clusters of Kubernetes."""
