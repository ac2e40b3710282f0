"""The roofline: closed forms of its parts, and that it scales as its parts do."""

from dataclasses import replace

import pytest

from comet_megatron.checkpoint.hf_import import PAPER_SIZES
from comet_megatron.chunking import plan_chunks
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import Kind, Op
from comet_megatron.planning.activations import Shards
from comet_megatron.planning.advise import model_flops
from comet_megatron.planning.costs import head_flops, layer_flops
from comet_megatron.planning.devices import GPUS, find_gpu
from comet_megatron.planning.memory import Parameters, count_parameters
from comet_megatron.planning.shapes import BACKBONES, named_shape
from comet_megatron.planning.time import Efficiency, Roofline

MODEL, MEMORY = named_shape("qwen3-8b")
CHUNK = plan_chunks(131072, MEMORY)[-2]
PERFECT = Efficiency(1.0, 1.0, 1.0, 1.0)


def roofline(*, precision="bf16", tp=1, gpu="h100", efficiency=PERFECT, **changes):
    shards = Shards(tp, sequence_parallel=tp > 1, on_cuda=True)
    return Roofline(MODEL, MEMORY, replace(GPUS[gpu], **changes), precision, shards, efficiency)


def test_with_memory_and_links_that_take_no_time_a_layer_takes_its_flops_at_the_peak():
    fast = {"memory_bandwidth": 1e30, "nvlink_bandwidth": 1e30}
    forward, backward = roofline(**fast).layer_seconds(CHUNK)
    flops = layer_flops(MODEL, CHUNK)
    assert forward == pytest.approx(flops / GPUS["h100"].bf16_flops)
    width, pairs = 32 * 128, CHUNK.num_rows * (CHUNK.num_slots + CHUNK.num_rows / 2)
    assert backward == pytest.approx((2 * flops + 0.5 * 4 * width * pairs) / GPUS["h100"].bf16_flops)
    assert roofline(**fast).head_seconds(2048) == pytest.approx(3 * head_flops(MODEL, 2048) / GPUS["h100"].bf16_flops)


def test_shares_of_the_peaks_stretch_what_they_are_of():
    fast = {"memory_bandwidth": 1e30}
    whole, _ = roofline(**fast).layer_seconds(CHUNK)
    half, _ = roofline(efficiency=Efficiency(0.5, 0.5, 1.0, 1.0), **fast).layer_seconds(CHUNK)
    assert half == pytest.approx(2 * whole)


def test_products_are_as_slow_as_the_memory_where_that_is_slower():
    slow = {"memory_bandwidth": 1e9}
    for peak in (1e12, 1e15):
        forward, _ = roofline(bf16_flops=1e30, fp8_flops=peak, **slow).layer_seconds(CHUNK)
        assert forward == pytest.approx(roofline(bf16_flops=1e30, **slow).layer_seconds(CHUNK)[0])


def test_two_tensor_parallel_ranks_need_more_than_half_the_time_of_one():
    alone, shared = (sum(roofline(tp=tp).layer_seconds(CHUNK)) for tp in (1, 2))
    assert alone / 2 < shared < alone


def test_fp8_speeds_up_products_alone():
    bf16, fp8 = (
        roofline(precision=precision, memory_bandwidth=1e30).layer_seconds(CHUNK)[0] for precision in ("bf16", "fp8")
    )
    attention = roofline()._attention_seconds(CHUNK)
    assert attention < fp8 < bf16 and fp8 > bf16 / 2


def test_a_backward_with_the_head_and_a_forward_of_some_layers():
    times = roofline()
    forward, backward = times.layer_seconds(CHUNK)
    assert times.op_seconds(Op(Kind.FORWARD, 0, 0, 0), CHUNK, layers=5, has_head=True) == pytest.approx(5 * forward)
    head = times.head_seconds(CHUNK.num_text)
    whole = times.op_seconds(Op(Kind.BACKWARD, 0, 0, 0), CHUNK, layers=5, has_head=True)
    assert whole == pytest.approx(5 * backward + head)


def test_what_is_sent_between_machines_is_slower_and_one_rank_reduces_nothing():
    times, weights = roofline(), Parameters(10**9, 10**9)
    near, far = (
        times.reduction_seconds(weights, dp=8, zero1=True, between_machines=between) for between in (False, True)
    )
    assert near == pytest.approx(7 / 8 * 6e9 / 450e9) and far == pytest.approx(near * 9)
    assert times.reduction_seconds(weights, dp=1, zero1=True, between_machines=True) == 0
    assert times.message_seconds(CHUNK, between_machines=True) > times.message_seconds(CHUNK, between_machines=False)


def test_flops_of_a_sequence_are_three_times_its_forward():
    chunks = plan_chunks(5000, MEMORY)
    forward = sum(36 * layer_flops(MODEL, c) + head_flops(MODEL, c.num_text) for c in chunks)
    assert model_flops(MODEL, chunks) == pytest.approx(3 * forward)


@pytest.mark.parametrize("text", ["gemm", "gemm=2", "speed=0.5", "gemm=0", "gemm=x"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="is no share"):
        Efficiency.parse(text)


def test_shares_are_read_from_words():
    assert Efficiency.parse("gemm=0.7, links=0.9") == Efficiency(gemm=0.7, links=0.9)
    assert Efficiency.parse("") == Efficiency()


def test_gpus_are_found_by_the_names_that_drivers_give():
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    with pytest.raises(ConfigError, match="use one of a100"):
        find_gpu("NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.72),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
    ],
)
def test_named_shapes_have_as_many_weights_as_their_makers_publish(name, billions):
    memory = replace(named_shape(name)[1], stride=-1, global_beacon_ids=())
    assert count_parameters(BACKBONES[name], memory, BACKBONES[name].num_layers).all / 1e9 == pytest.approx(
        billions, rel=2e-3
    )


def test_the_memory_of_named_shapes_is_the_one_an_import_gives():
    sizes = named_shape("qwen3-4b")[1]
    assert {name: getattr(sizes, name) for name in PAPER_SIZES} == PAPER_SIZES
    assert sizes.beacon_id < named_shape("qwen3-4b")[0].vocab_size
