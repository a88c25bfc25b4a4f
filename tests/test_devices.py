"""Which accelerator a machine has, told without starting JAX."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.devices import PCI_DEVICES, PCI_VENDOR, tpu_on_bus


def bus(folder: Path, *numbers: tuple[str, str]) -> Path:
    """A folder of PCI devices as Linux lists them."""
    for place, (vendor, device) in enumerate(numbers):
        each = folder / f"0000:00:0{place}.0"
        each.mkdir()
        (each / "vendor").write_text(f"{vendor}\n")
        (each / "device").write_text(f"{device}\n")
    return folder


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ([(PCI_VENDOR, "0x0063")], True),
        ([("0x8086", "0x1237"), (PCI_VENDOR, "0x0062")], True),
        # Google's network card, which each of its cloud machines has; a GPU; nothing at all.
        ([(PCI_VENDOR, "0x0042")], False),
        ([("0x10de", "0x0063")], False),
        ([], False),
    ],
)
def test_a_tpu_on_the_bus_is_told_by_its_maker_and_number(tmp_path, numbers, expected):
    assert tpu_on_bus(bus(tmp_path, *numbers)) is expected


def test_a_machine_without_such_a_folder_or_number_has_none(tmp_path):
    assert not tpu_on_bus(tmp_path / "none")
    (tmp_path / "0000:00:00.0").mkdir()
    assert not tpu_on_bus(tmp_path)


def test_the_numbers_are_those_that_jax_knows(devices):
    from jax._src import hardware_utils

    known = {number for number, version in hardware_utils._TPU_PCI_DEVICE_IDS.items() if version.name != "plc"}
    assert known == PCI_DEVICES
    assert hardware_utils._GOOGLE_PCI_VENDOR_ID == PCI_VENDOR
