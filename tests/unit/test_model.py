"""Values: a stub's attribute, generations and object keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierfs import model
from tierfs.codec import pack_record, unpack_record
from tierfs.errors import IndexError_
from tierfs.model import Copy, Record, Residency, Stub, leaf_count, make_generation, object_key

GENERATIONS = st.integers(0, (1 << 48) - 1)
COPIES = st.builds(
    Copy,
    generation=GENERATIONS,
    tag=st.binary(min_size=8, max_size=8),
    digest=st.binary(min_size=32, max_size=32),
    size=st.integers(0, (1 << 63) - 1),
    mtime=st.integers(-(1 << 63), (1 << 63) - 1),
    ctime=st.integers(-(1 << 63), (1 << 63) - 1),
    custody=st.integers(0, 0xFFFFFFFF),
    chunk_shift=st.integers(16, 31),
)
STUBS = st.builds(
    Stub,
    fid=st.binary(min_size=16, max_size=16),
    generation=GENERATIONS,
    tag=st.binary(min_size=8, max_size=8),
    digest=st.binary(min_size=32, max_size=32),
    chunk_shift=st.integers(16, 31),
)


@given(STUBS)
def test_a_stub_fits_the_inode_and_comes_back(stub):
    raw = stub.pack()
    assert len(raw) <= model.STUB_XATTR_LIMIT and Stub.unpack(raw) == stub


@given(STUBS, st.integers(0, 63))
def test_a_stub_of_another_version_or_length_is_refused(stub, cut):
    raw = stub.pack()
    for other in (raw[:cut], raw + b"x", b"\x02" + raw[1:], raw[:1] + b"\x80" + raw[2:]):
        with pytest.raises(ValueError, match="known version"):
            Stub.unpack(other)


@given(st.integers(0, (1 << 20) - 2), st.integers(0, (1 << 28) - 1), st.integers(0, (1 << 28) - 1))
def test_later_epochs_have_larger_generations(epoch, counter, other):
    assert make_generation(epoch, counter) < make_generation(epoch + 1, other) < 1 << 48


def test_a_key_names_file_generation_and_copy():
    key = object_key(b"\xab" * 16, 0x123, b"\1" * 8)
    assert key == "data/ab/" + "ab" * 16 + "/000000000123-" + "01" * 8
    assert Stub(b"\xab" * 16, 0x123, b"\1" * 8, b"d" * 32).key == key
    assert model.new_fid() != model.new_fid() and model.new_tag() != model.new_tag()


@pytest.mark.parametrize(("size", "leaves"), [(0, 0), (1, 1), (65536, 1), (65537, 2), (1 << 40, 1 << 24)])
def test_leaf_counts(size, leaves):
    assert leaf_count(size) == leaves


@given(
    st.binary(max_size=132),
    st.binary(max_size=255),
    COPIES | st.none(),
    GENERATIONS,
    st.sampled_from(Residency),
)
def test_a_record_comes_back_and_any_flipped_bit_is_noticed(handle, name, copy, generation, residency):
    record = Record(7, handle, b"f" * 16, generation, residency, 1, 2, 3, 4, name, copy, -5)
    raw = pack_record(record)
    assert unpack_record(7, raw) == record
    assert len(raw) <= 180 + len(handle) + len(name)
    for at in range(0, len(raw), 7):
        with pytest.raises(IndexError_):
            unpack_record(7, raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
