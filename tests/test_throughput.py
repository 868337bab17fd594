import types

import jax
import pytest

from llm_jax.throughput import WINDOW_STEPS, Throughput, peak_flops


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_throughput_counts_training_time_only():
    clock = Clock()
    throughput = Throughput(devices=2, clock=clock)
    assert throughput.read() == {} and throughput.average() is None
    clock.now += 30  # compilation
    throughput.start(flops_per_token=10.0, peak=500.0)
    for _ in range(3):
        clock.now += 2
        throughput.tick(100)
    assert throughput.read() == {"tokens_per_second": 50.0, "mfu": 0.5}

    clock.now += 1
    throughput.pause()
    clock.now += 60  # an evaluation in the midst of a step
    throughput.pause()  # a pause in a pause changes nothing
    throughput.resume()
    clock.now += 1
    throughput.tick(100)
    assert throughput.read() == {"tokens_per_second": 50.0, "mfu": 0.5}
    assert throughput.average() == 50.0 and throughput.average_mfu() == 0.5


def test_a_phase_begins_a_new_window_and_the_averages_go_on():
    clock = Clock()
    throughput = Throughput(devices=1, clock=clock)
    throughput.start(flops_per_token=10.0, peak=1000.0)
    clock.now += 1
    throughput.tick(100)
    throughput.pause()
    throughput.start(flops_per_token=40.0, peak=1000.0)
    clock.now += 3
    throughput.tick(60)
    assert throughput.read() == {"tokens_per_second": 20.0, "mfu": 0.8}
    assert throughput.average() == 40.0
    assert throughput.average_mfu() == pytest.approx((100 * 10 + 60 * 40) / 4 / 1000)


def test_the_window_forgets_old_steps():
    clock = Clock()
    throughput = Throughput(devices=1, clock=clock)
    throughput.start(flops_per_token=None, peak=1000.0)
    for seconds in [10] * 5 + [1] * WINDOW_STEPS:
        clock.now += seconds
        throughput.tick(7)
    assert throughput.read() == {"tokens_per_second": 7.0}
    assert throughput.average_mfu() is None


def test_mfu_is_absent_where_the_peak_is_unknown():
    clock = Clock()
    throughput = Throughput(devices=1, clock=clock)
    throughput.start(flops_per_token=10.0, peak=peak_flops(jax.devices("cpu")[0]))
    clock.now += 1
    throughput.tick(100)
    assert throughput.read() == {"tokens_per_second": 100.0}
    assert throughput.average_mfu() is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("cpu", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v3", 61.5e12),
        ("TPU v99", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_go_by_the_name_of_the_device(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
