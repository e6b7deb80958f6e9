from __future__ import annotations

from yolotrt import machine


def test_a_machine_is_described_with_processor_load_and_versions():
    described = machine.describe_machine()
    assert "cores usable" in described["processor"]
    assert "numpy " in described["libraries"]
    assert all(value and "\n" not in value for value in described.values())


def test_a_gpu_is_described_with_its_clocks(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.describe_machine()["GPU"] == (
        "NVIDIA H200, driver 580.1, SM 345 MHz, SM at most 1980 MHz, memory 3201 MHz, power limit 700.00 W, "
        "degrees Celsius 31"
    )


def test_a_broken_driver_is_no_failure(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "GPU" not in machine.describe_machine()
