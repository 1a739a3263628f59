"""Ranks over tasks: Demšar's critical difference, and no alarm where nothing differs."""

import numpy as np
import pytest

from dual_lora.lab.comparison.ranking import rank_methods


def test_ranks_and_critical_difference():
    # Demšar 2006, table 6: 4 methods on 14 data sets have a critical difference of 1.25 at 5 % (q = 2.569)
    random = np.random.default_rng(11)
    quality = random.random(14)
    ranking = rank_methods({name: quality + gain for name, gain in zip("abcd", (0.3, 0.2, 0.1, 0), strict=True)})
    assert ranking.critical == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=2e-3)
    assert ranking.ranks == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert ranking.groups == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert ranking.p < 0.01


def test_ranks_of_equal_methods_raise_no_alarm():
    random = np.random.default_rng(12)
    p = [rank_methods(dict(zip("abc", random.random((3, 6)), strict=True)), seed=i).p for i in range(60)]
    assert np.mean(np.array(p) < 0.05) <= 0.13
    tied = rank_methods({name: [0.5] * 4 for name in "abc"})
    assert set(tied.ranks.values()) == {2.0}
    assert tied.p == 1.0
    assert tied.groups == [["a", "b", "c"]]
    few = rank_methods({"a": [1, 1], "b": [0, 0], "c": [2, 2]})
    assert "told apart" in few.note
