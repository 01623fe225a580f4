"""What every test shares: one thread (the models are tiny), a seed, and a global state left as found."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)  # what seed_everything leaves behind seeds processes that later tests start
