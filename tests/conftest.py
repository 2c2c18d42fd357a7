import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "atdiag",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("atdiag")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
