"""A SLURM of one node for the tests of this folder, started once."""

import subprocess

import pytest

from tests.cluster import one_node


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """Start SLURM on this machine; its environment. Skipped, with the reason, where it can't be started."""
    if reason := one_node.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        environment = one_node.start(folder, cpus=4)
        one_node.submit_nothing(folder)
    except (OSError, RuntimeError, subprocess.SubprocessError) as fault:
        one_node.stop(folder)
        pytest.skip(f"SLURM does not work here: {fault}")
    yield environment
    one_node.stop(folder)


@pytest.fixture
def cluster(node, monkeypatch):
    """Let this test's commands find the SLURM of this machine."""
    for name, value in node.items():
        monkeypatch.setenv(name, value)
    return node
