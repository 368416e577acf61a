"""The cluster that the tests of this folder share."""

from __future__ import annotations

from tests.ray_fixture import ray_cluster, toy_service

__all__ = ["ray_cluster", "toy_service"]
