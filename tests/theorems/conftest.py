"""The toys, each wrapped once for all theorems."""

import pytest

from tests.properties.hosts import TOYS, Toy
from tests.properties.theorem_case import Case


@pytest.fixture(scope="session", params=TOYS.values(), ids=lambda toy: toy.name)
def case(request: pytest.FixtureRequest) -> Case:
    toy: Toy = request.param
    host = toy.build()
    keys = list(host.state_dict())
    return Case(toy, host, toy.wrap(host), keys)
