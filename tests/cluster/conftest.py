"""A SLURM of one node for the tests of this folder, started once."""

import pytest

from tests.cluster import one_node


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """Start SLURM on this machine; its environment. Skipped, with the reason, where it can't be started."""
    if reason := one_node.missing():
        pytest.skip(reason)
    with one_node.cluster(tmp_path_factory.mktemp("slurm"), cpus=4) as environment:
        yield environment


@pytest.fixture
def cluster(node, monkeypatch):
    """Let this test's commands find the SLURM of this machine."""
    for name, value in node.items():
        monkeypatch.setenv(name, value)
    return node
