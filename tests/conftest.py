import os

import pytest
import torch
from fontTools import subset
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on a CPU

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


@pytest.fixture(scope="session", autouse=True)
def plain_fonts():
    """Embed fonts in PDFs without the tables that only typesetters read: half the time that writing a figure takes.

    With them in tests/figures/test_settings.py, whose processes are without this.
    """
    with pytest.MonkeyPatch.context() as patch:
        dropped = [*subset.Options()._drop_tables_default, "GDEF", "GPOS", "GSUB"]
        patch.setattr(subset.Options, "_drop_tables_default", dropped)
        yield
