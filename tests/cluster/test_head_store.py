"""Where a head keeps its state, read from how its GCS was started."""

from __future__ import annotations

import pytest

from cluster.errors import StateKept
from cluster.head_store import HeadStore, store_of
from cluster.processes import free_ports

GCS = ["/ray/gcs_server", "--gcs_server_port=6379", "--node-ip-address=10.0.0.10"]


def test_a_gcs_without_redis_keeps_nothing():
    assert store_of(GCS, {}) is None


def test_a_gcs_tells_its_redis_and_its_part_of_it():
    redis = ["--redis_address=10.0.0.5", "--redis_port=6380", "--redis_enable_ssl=true"]
    secret = ["--redis_username=me", "--redis_password=a=b"]

    store = store_of([*GCS, *redis, *secret], {"RAY_external_storage_namespace": "lab"})

    assert store == HeadStore("10.0.0.5", 6380, "me", "a=b", encrypted=True, namespace="lab")


def test_a_redis_that_is_away_is_told_with_what_stays_there():
    """Ray itself tries for a minute, and then ends the process."""
    [port] = free_ports(1)
    store = HeadStore("127.0.0.1", port, "", "", encrypted=False, namespace="lab")

    with pytest.raises(StateKept, match=rf"127\.0\.0\.1:{port} .*refused.*keys RAYlab@\*"):
        store.forget()


def test_without_a_namespace_it_is_rays_own():
    redis = ["--redis_address=10.0.0.5", "--redis_port=6379", "--redis_enable_ssl=false"]

    store = store_of([*GCS, *redis], {})

    assert store == HeadStore("10.0.0.5", 6379, "", "", encrypted=False, namespace="default")
