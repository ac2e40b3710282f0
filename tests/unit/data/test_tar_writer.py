"""The tar writer gives webdataset's bytes, and tells where each payload lies."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
from webdataset import TarWriter

from comet_megatron.data.tar_writer import TarFileWriter


@pytest.mark.parametrize("num_samples", [0, 1, 3, 40])
def test_the_bytes_are_those_of_webdataset_and_the_offsets_those_of_the_payloads(num_samples: int) -> None:
    generator = random.Random(num_samples)
    ours, theirs, members = io.BytesIO(), io.BytesIO(), []
    writer, reference = TarFileWriter(ours), TarWriter(theirs, encoder=False, mtime=0)
    for number in range(num_samples):
        sizes = generator.choice([0, 1, 511, 512, 513]), generator.randint(0, 30_000)
        sample = {kind: generator.randbytes(size) for kind, size in zip(("ids.npy", "meta.json"), sizes, strict=True)}
        reference.write({"__key__": f"{number:09d}", **sample})
        members += [(writer.add(f"{number:09d}.{kind}", payload), payload) for kind, payload in sample.items()]
    writer.close()
    reference.close()
    assert ours.getvalue() == theirs.getvalue()
    assert all(ours.getvalue()[offset : offset + len(payload)] == payload for offset, payload in members)
    ours.seek(0)
    with tarfile.open(fileobj=ours, mode="r:") as tar:
        assert [member.offset_data for member in tar] == [offset for offset, _ in members]


@pytest.mark.parametrize("name", ["", "a" * 101, "naïve.json", "a\0b"])
def test_a_name_that_has_no_place_in_a_plain_header_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        TarFileWriter(io.BytesIO()).add(name, b"")
