"""Which tables share one gather."""

import operator

import torch
from torch import fx

from tokenprune.rewrite.tables import _number


def test_equal_calls_share_a_number_and_random_or_written_ones_do_not() -> None:
    graph = fx.Graph()
    table = graph.placeholder("table")
    known: dict[object, int] = {}

    def numbers(target: object, *args: object) -> tuple[int, int]:
        one, other = (graph.call_function(target, args) for _ in range(2))
        return _number(one, known), _number(other, known)

    for target, *args in ((torch.sin, table), (operator.getitem, table, 0)):
        one, other = numbers(target, *args)
        assert one == other
    for target, *args in ((torch.rand, 3), (torch.bernoulli, table), (operator.iadd, table, 1)):
        one, other = numbers(target, *args)
        assert one != other


def test_a_number_of_the_graph_is_no_number_of_the_source() -> None:
    graph = fx.Graph()
    table = graph.placeholder("table")
    length = graph.call_function(len, (table,))
    known: dict[object, int] = {}
    number = _number(length, known)
    one = graph.call_function(operator.add, (table, length))
    other = graph.call_function(operator.add, (table, number))
    assert _number(one, known) != _number(other, known)
