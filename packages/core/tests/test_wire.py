"""Messages: what goes in comes out, and foreign bytes are refused by name."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import wire
from headrace.errors import ApplyError, HeadraceError, RemoteFailure, RemoteProtocolError, VersionSkewError
from headrace.geometry import Box, RegionTable
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import ParamMeta, ParamTable, WorkerId


def _recipe() -> LoadRecipe:
    table = ParamTable([ParamMeta("a", "bfloat16", (3, 4)), ParamMeta("s", "int8", ())])
    regions = RegionTable.from_rows([(0, Box((0, 0), (3, 4)), 0, 16, (8, 2)), (1, Box((), ()), 1, 0, ())])
    none = np.zeros(0, np.int32)
    return LoadRecipe(table, table, regions, FillTable.empty(), none, none, {"a": "why"}, proven=True)


def test_a_recipe_survives_the_wire() -> None:
    recipe = _recipe()
    answer = wire.Described(
        recipe_key="k", recipe=recipe, reachable=("h",), budget_bytes=7, reserved_bytes=0, first=True
    )
    back = wire.decode(wire.encode(answer))
    assert isinstance(back, wire.Described)
    assert back.recipe is not None
    assert back.recipe.key == recipe.key
    assert back.recipe.sources == recipe.sources
    assert back.recipe.opaque_reasons == {"a": "why"}


def test_a_failure_survives_the_wire_as_the_class_it_was() -> None:
    error = ApplyError("no", name="w", phase="commit", weights_state="mixed")
    back = wire.decode(wire.encode(wire.Failed(failure=RemoteFailure.of(error))))
    assert isinstance(back, wire.Failed)
    rebuilt = back.failure.to_error()
    assert type(rebuilt) is ApplyError
    assert (rebuilt.name, rebuilt.phase) == ("w", "commit")


def test_a_foreign_exception_arrives_by_name() -> None:
    rebuilt = RemoteFailure.of(KeyError("x"), phase="load").to_error()
    assert type(rebuilt) is HeadraceError
    assert "KeyError" in str(rebuilt)
    assert rebuilt.phase == "load"


def test_another_protocol_version_is_named() -> None:
    header, body = wire.encode(wire.Prepare())
    other = header[:4] + (wire.PROTOCOL_VERSION + 1).to_bytes(2, "little")
    with pytest.raises(VersionSkewError, match=f"speaks protocol {wire.PROTOCOL_VERSION + 1}"):
        wire.decode([other, body])


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_garbage_is_refused(frames: list[bytes]) -> None:
    with pytest.raises((RemoteProtocolError, VersionSkewError)):
        wire.decode(frames)


@given(st.binary(max_size=200))
def test_garbage_behind_a_good_header_is_refused(body: bytes) -> None:
    header = wire.encode(wire.Prepare())[0]
    try:
        message = wire.decode([header, body])
    except RemoteProtocolError:
        return
    assert isinstance(message, wire.Message)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_message_is_refused_or_is_a_message(place: int, value: int) -> None:
    header, body = wire.encode(
        wire.Described(recipe_key="k", recipe=_recipe(), reachable=(), budget_bytes=1, reserved_bytes=0, first=False)
    )
    damaged = bytearray(body)
    damaged[place % len(damaged)] = value
    try:
        wire.decode([header, bytes(damaged)])
    except RemoteProtocolError:
        return


def test_arrays_of_objects_have_no_place() -> None:
    header = wire.encode(wire.Prepare())[0]
    body = msgspec.msgpack.encode({"type": "Committed", "digests": ("|O", (1,), b"12345678")})
    with pytest.raises(RemoteProtocolError, match="no place"):
        wire.decode([header, body])


def test_an_instance_and_rank_read_well() -> None:
    assert str(WorkerId("a", 3)) == "a[3]"
