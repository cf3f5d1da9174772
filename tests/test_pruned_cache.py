import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from modeling_glimpseprune.pruned_cache import PrunedLayer

HEADS, SIZE = 2, 3


def states(rows: list[list[float]]) -> torch.Tensor:
    """`(batch, heads, length, size)` keys that hold one number a slot."""
    return torch.tensor(rows)[:, None, :, None].expand(-1, HEADS, -1, SIZE).clone()


def pruned_layer(
    rows: list[list[float]], padding: list[int], dropped: int, fixed: int
) -> PrunedLayer:
    """A layer whose prompt takes the given slots.

    Args:
        padding: how many of each row's first slots are not real.
        dropped: tokens that the prompt had beside.
        fixed: slots up to the prompt's last visual token.
    """
    layer = PrunedLayer()
    layer.update(states(rows), -states(rows))
    slots = len(rows[0])
    layer.dropped, layer.prompt_slots, layer.fixed_slots = dropped, slots, fixed
    if any(padding):
        layer.prompt_mask = torch.arange(slots) >= torch.tensor(padding)[:, None]
    return layer


class PrunedLayerMachine(RuleBasedStateMachine):
    """Any sequence of cache operations, beside rows that are plain lists of numbers."""

    @initialize(
        batch=st.integers(1, 3),
        slots=st.integers(1, 5),
        dropped=st.integers(1, 6),
        data=st.data(),
    )
    def prune(self, batch, slots, dropped, data):
        self.padding = [data.draw(st.integers(0, slots - 1)) for _ in range(batch)]
        if not data.draw(st.booleans()):
            self.padding = [0] * batch
        self.fixed = data.draw(st.integers(1, slots))
        self.next_number, self.prompt_slots, self.dropped = 1.0, slots, dropped
        self.rows = [[] for _ in range(batch)]
        new = self._extend(slots)
        self.has_mask = any(self.padding)
        self.layer = pruned_layer(new, self.padding, dropped, self.fixed)

    def _extend(self, count: int) -> list[list[float]]:
        new = []
        for row in self.rows:
            new.append([self.next_number + i for i in range(count)])
            self.next_number += count
            row += new[-1]
        return new

    @rule(count=st.integers(1, 4))
    def update(self, count):
        new = self._extend(count)
        keys, values = self.layer.update(states(new), -states(new))
        torch.testing.assert_close(keys, states(self.rows), rtol=0, atol=0)
        torch.testing.assert_close(values, -states(self.rows), rtol=0, atol=0)

    @rule(data=st.data())
    def reorder(self, data):
        source = [data.draw(st.integers(0, len(self.rows) - 1)) for _ in self.rows]
        self.layer.reorder_cache(torch.tensor(source))
        self._take_rows(source)

    @rule(data=st.data())
    def select(self, data):
        rows = st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=6)
        source = data.draw(rows)
        self.layer.batch_select_indices(torch.tensor(source))
        self._take_rows(source)

    @precondition(lambda self: len(self.rows) < 5)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.layer.batch_repeat_interleave(repeats)
        self._take_rows([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _take_rows(self, source: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in source]
        self.padding = [self.padding[row] for row in source]

    @rule(data=st.data(), absolute=st.booleans())
    def crop(self, data, absolute):
        removed = data.draw(st.integers(0, len(self.rows[0]) - self.fixed))
        self.layer.crop(self._logical() - removed if absolute else -removed)
        self.rows = [row[: len(row) - removed] for row in self.rows]
        self.prompt_slots = min(self.prompt_slots, len(self.rows[0]))

    @rule(beyond=st.integers(1, 4), absolute=st.booleans())
    def crop_into_the_visual_tokens(self, beyond, absolute):
        removed = len(self.rows[0]) - self.fixed + beyond
        if not absolute or removed < self._logical():
            with pytest.raises(ValueError, match="visual tokens"):
                self.layer.crop(self._logical() - removed if absolute else -removed)

    @rule(beyond=st.integers(0, 4))
    def crop_beyond_the_end(self, beyond):
        self.layer.crop(self._logical() + beyond)

    def _logical(self) -> int:
        return len(self.rows[0]) + self.dropped

    @invariant()
    def lengths_agree(self):
        layer, physical = self.layer, len(self.rows[0])
        assert layer.get_seq_length() == self._logical()
        assert layer.keys.shape == layer.values.shape == (len(self.rows), HEADS, physical, SIZE)
        assert layer.dropped == self.dropped
        for query in (3, torch.arange(self._logical(), self._logical() + 3)):
            assert layer.get_mask_sizes(query) == (physical + 3, self.dropped)

    @invariant()
    def contents_agree(self):
        layer = self.layer
        torch.testing.assert_close(layer.keys, states(self.rows), rtol=0, atol=0)
        torch.testing.assert_close(layer.values, -states(self.rows), rtol=0, atol=0)
        assert (layer.prompt_mask is not None) == self.has_mask
        if self.has_mask:
            slots = range(self.prompt_slots)
            expected = [[slot >= padding for slot in slots] for padding in self.padding]
            assert layer.prompt_mask.tolist() == expected


TestPrunedLayer = PrunedLayerMachine.TestCase
TestPrunedLayer.settings = settings(deadline=None, max_examples=60, stateful_step_count=12)


def test_keep_takes_each_rows_slots_in_order():
    layer = PrunedLayer()
    layer.update(states([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), states([[7.0, 8.0, 9.0], [1.0] * 3]))
    layer.keep(torch.tensor([[0, 2], [1, 2]]))
    torch.testing.assert_close(layer.keys, states([[1.0, 3.0], [5.0, 6.0]]))
    torch.testing.assert_close(layer.values, states([[7.0, 9.0], [1.0, 1.0]]))


def test_an_unpruned_layer_is_a_dynamic_layer():
    layer = PrunedLayer()
    assert layer.get_seq_length() == 0
    layer.update(states([[1.0, 2.0, 3.0]]), states([[4.0, 5.0, 6.0]]))
    assert layer.get_seq_length() == 3 and layer.get_mask_sizes(2) == (5, 0)
    layer.crop(-2)
    torch.testing.assert_close(layer.keys, states([[1.0]]))


def test_reset_forgets_the_pruning():
    layer = pruned_layer([[1.0, 2.0]], padding=[1], dropped=4, fixed=1)
    layer.reset()
    assert layer.dropped == 0 and layer.prompt_mask is None
    layer.update(states([[5.0]]), states([[6.0]]))
    assert layer.get_seq_length() == layer.keys.shape[-2]


def test_operations_of_the_whole_cache_reach_its_layers():
    cache = DynamicCache()
    prompt = [[1.0, 2.0], [3.0, 4.0]]
    cache.layers = [pruned_layer(prompt, padding=[0, 1], dropped=5, fixed=2)]
    cache.update(states([[7.0], [8.0]]), states([[7.0], [8.0]]), 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.get_seq_length() == 8
    assert cache.layers[0].prompt_mask.tolist() == [[False, True]] * 2
    torch.testing.assert_close(cache.layers[0].keys, states([[3.0, 4.0, 8.0]] * 2))
    cache.crop(-1)
    assert cache.get_seq_length() == 7
