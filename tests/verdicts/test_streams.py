"""Addressed streams: equal only if seed and path are equal, and the same numbers for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verdicts.streams import Stream

paths = st.lists(st.one_of(st.text(max_size=4), st.integers(-3, 3)), max_size=4).map(tuple)


@given(st.integers(0, 2**64 - 1), paths, st.integers(0, 2**64 - 1), paths)
def test_streams_are_equal_only_if_seed_and_path_are(seed, path, other_seed, other_path):
    first, second = Stream(seed, path), Stream(other_seed, other_path)
    same = (seed, [(type(n), n) for n in path]) == (other_seed, [(type(n), n) for n in other_path])
    assert (first.integer() == second.integer()) == same
    assert np.array_equal(first.generator().random(4), second.generator().random(4)) == same


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a", "bc"), ("ab", "c")),
        (("a", "b"), ("a,b",)),
        (('a", "b',), ("a", "b")),
        ((1,), ("1",)),
        ((1, 2), (12,)),
        ((), ("",)),
        (("é",), ("\\u00e9",)),
    ],
)
def test_joined_paths_do_not_collide(first, second):
    assert Stream(5, first).integer() != Stream(5, second).integer()
    assert Stream(5, first).generator().random() != Stream(5, second).generator().random()


def test_children_continue_the_path():
    assert Stream(3).child("a", 1).child("b") == Stream(3, ("a", 1, "b"))
    assert Stream(3).child(np.int64(4)) == Stream(3).child(4)


def test_numbers_are_pinned():
    """Recorded runs stay repeatable only as long as these numbers do not change."""
    stream = Stream(2024, ("claim", 7))
    assert stream.integer() == 1354639523741669722
    assert stream.generator().integers(2**32) == 3748099119


def test_integers_fill_their_range():
    integers = np.array([Stream(0).child(i).integer() for i in range(2000)], dtype=float) / 2.0**63
    assert integers.min() >= 0
    assert integers.max() < 1
    # Hoeffding: the mean of 2000 uniforms is off by more than 0.062 with probability below 1e-6.
    assert abs(integers.mean() - 0.5) < 0.062


def test_generators_start_afresh_and_differ_from_their_children():
    stream = Stream(11, ("x",))
    assert stream.generator().random() == stream.generator().random()
    assert stream.generator().random() != stream.child(0).generator().random()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, None])
def test_bad_seeds_are_named(seed):
    with pytest.raises(ValueError, match="seed is"):
        Stream(seed)


@pytest.mark.parametrize("name", [1.5, None, True, ("a",), b"a"])
def test_bad_names_are_named(name):
    with pytest.raises(ValueError, match="path holds"):
        Stream(1).child(name)
