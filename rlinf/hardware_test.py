from pathlib import Path

import pytest

from rlinf import hardware

AVX512 = "processor\t: 0\nmodel name\t: A CPU @ 2.50GHz bf16\nflags\t\t: fpu avx2 avx512f avx512vl\n"


@pytest.mark.parametrize(
    ("text", "multiplies"),
    [
        (AVX512, False),
        (AVX512.replace("avx512vl", "avx512vl avx512_bf16"), True),
        (AVX512.replace("avx512vl", "amx_bf16 amx_tile"), True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_a_cpu_multiplies_bf16_when_its_flags_say_so(text: str, multiplies: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert hardware.cpu_multiplies_bf16(file) is multiplies
    assert not hardware.cpu_multiplies_bf16(tmp_path / "absent")


@pytest.mark.parametrize(
    ("device", "gpu", "bf16", "precision"),
    [
        ("cpu", True, False, "fp32"),
        ("cpu", False, True, "bf16"),
        ("cuda", False, False, "bf16"),
        ("auto", True, False, "bf16"),
        ("auto", False, False, "fp32"),
    ],
)
def test_the_fast_precision_is_that_of_the_device(
    device: str, gpu: bool, bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_gpu", lambda: gpu)
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: bf16)
    assert hardware.fast_precision(device) == precision
