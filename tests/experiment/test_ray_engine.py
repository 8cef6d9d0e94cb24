"""Actors of a real cluster of two nodes on one machine: a worker and then a node is lost in mid-run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from engines import ARMS, GIVEN, facts_of, serial

from kvpolicy import compare
from kvpolicy.errors import CompareError
from kvpolicy.experiment.cluster import ClusterPool, asked_for, open_cluster
from kvpolicy.experiment.engines import Engine
from kvpolicy.experiment.store import Store

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.second = found.add_node(**node)
    yield found
    ray.shutdown()
    found.shutdown()


def test_rows_are_those_of_a_serial_run_though_a_worker_and_then_a_node_is_lost(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, give, lost, known = Store.add, ClusterPool.give, list[str](), list[int]()

    def note(self: ClusterPool, worker: int, *given: Any) -> None:
        known.append(ray.get(self.alive[worker].__ray_call__.remote(lambda _: os.getpid())))
        give(self, worker, *given)

    def lose(self: Store, row: Any, attention: Any = None) -> None:
        add(self, row, attention)
        if not lost:
            os.kill(known[0], signal.SIGKILL)
            lost.append("worker")
        elif len(lost) == 1:
            cluster.remove_node(cluster.second, allow_graceful=False)
            lost.append("node")

    monkeypatch.setattr(ClusterPool, "give", note)
    monkeypatch.setattr(Store, "add", lose)
    found = compare(ARMS, engine={"name": "ray", "address": cluster.address}, **GIVEN)
    assert lost == ["worker", "node"]
    assert [facts_of(r) for r in found.evidence.rows] == [facts_of(r) for r in serial().rows]
    assert not ray.is_initialized()


def test_what_is_asked_of_ray() -> None:
    engine, cards = Engine(name="ray", cpus=2), {"CPU": 8.0, "GPU": 4.0}
    assert asked_for(engine, None, {"CPU": 8.0}) == {"CPU": 2, "GPU": 0}
    assert asked_for(engine, None, cards) == asked_for(engine, "cuda", {}) == {"CPU": 2, "GPU": 1}
    assert asked_for(engine, "cpu", cards) == {"CPU": 2, "GPU": 0}
    assert asked_for(Engine(name="ray", gpus=4), None, cards) == {"CPU": 1, "GPU": 4}
    with pytest.raises(CompareError, match="device must have no number, found 'cuda:1'"):
        asked_for(engine, "cuda:1", cards)
    nowhere, job = Engine(name="ray", address="127.0.0.1:1"), None
    told = r"cluster '127\.0\.0\.1:1' can't be reached: ConnectionRefused.*--address"
    with pytest.raises(CompareError, match=told), open_cluster(nowhere, job):  # type: ignore[arg-type]
        raise AssertionError("connected")
