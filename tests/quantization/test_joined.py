"""How rows of several forms are dealt to devices."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.quantization.codes import Form
from jaxserve.quantization.joined import split
from jaxserve.sharding.split import Run

FORMS = (Form(code="int4", extra="zero"), Form(code="int8", extra="zero"))


@pytest.mark.parametrize(("rows", "devices", "first", "second"), [
    ([(0, 8)], 1, [(0, 6)], [(0, 2)]),
    ([(0, 3), (6, 1), (3, 3), (7, 1)], 2, [(0, 3), (3, 3)], [(0, 1), (1, 1)]),      # devices have rows of each
    ([(0, 3), (6, 2), (3, 3), (6, 2)], 2, [(0, 3), (3, 3)], [(0, 2), (0, 2)]),      # a copied head
    ([(0, 2), (4, 3), (2, 2), (6, 1), (7, 1), (7, 1)], 2, [(0, 2), (4, 2), (2, 2)], None),
    ([(0, 4), (4, 4)], 2, None, None),                                              # one device has no second part
    ([(6, 1), (0, 3), (7, 1), (3, 3)], 2, None, None),                              # not in order
    ([(0, 3), (6, 1), (3, 3), (None, 1)], 2, None, None),                           # filled up
])
def test_parts_lie_alike_on_every_device_or_not_at_all(rows: Any, devices: int, first: Any, second: Any) -> None:
    found = split(FORMS, (6, 2), tuple(Run(*row) for row in rows), devices)
    if second is None:
        assert found is None
        return
    assert found is not None and [part.form for part in found] == list(FORMS)
    assert [[(run.start, run.count) for run in part.rows] for part in found] == [first, second]
