"""The toys, each wrapped once for all theorems."""

import pytest

from tests.theorems.case import Case
from tests.toys.table import TOYS, Toy


@pytest.fixture(scope="session", params=TOYS.values(), ids=lambda toy: toy.name)
def case(request: pytest.FixtureRequest) -> Case:
    toy: Toy = request.param
    host = toy.build()
    keys = list(host.state_dict())
    return Case(toy, host, toy.wrap(host), keys)
