"""Work on many tensors at once."""

from __future__ import annotations

import pytest

from export.compression.parallel import in_order


def test_work_in_order_keeps_its_order_passes_errors_on_and_does_not_nest_threads() -> None:
    assert list(in_order(lambda item: item * item, range(50), workers=3)) == [item * item for item in range(50)]
    assert list(in_order(lambda item: list(in_order(str, range(item), workers=2)), [2, 1], workers=2)) == [["0", "1"], ["0"]]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 / item, [1, 0, 2], workers=2))
