"""A step on the GPU: the host waits for nothing inside it, fused gradients are the same, a full memory is explained."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from comet_megatron.chunking import next_token_labels
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.testing.gpu import ARCHITECTURE, MEMORY, batch, optimizer_of, text
from comet_megatron.testing.tiny import gradients, layout_alone
from comet_megatron.train.step import accumulate_gradients, train_step


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("backend", "precision"), [("torch", "bf16"), ("te", "bf16"), ("te", "fp8")])
def test_the_host_does_not_wait_for_the_device_inside_a_step(backend, precision, recompute, build):
    model = build(backend, precision, recipe="tensorwise" if precision == "fp8" else "")
    settings = BackwardSettings(recompute=recompute)

    def run() -> None:
        microbatches = [model.executor.microbatch(s[None], next_token_labels(s)[None]) for s in batch()]
        with model.accumulating():
            model.executor.train(microbatches, scale=1e-3, settings=settings, after_last_backward=model.start_reduction)

    model.zero_gradients()
    run()  # kernels are loaded, tables built
    model.finish_reduction(layout_alone())
    model.zero_gradients()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.finish_reduction(layout_alone())


def test_gradients_added_inside_the_product_are_the_same(build):
    found = []
    for fused in (False, True):
        model = build("te", "bf16")
        if fused:
            model.stages[0].fuse_weight_gradients()
        accumulate_gradients(model, batch(), layout_alone(), settings=BackwardSettings(recompute=True), step=1)
        found.append({name: grad.clone() for name, grad in gradients(model.stages).items()})
    plain, fused = found
    for name, grad in plain.items():
        likeness = torch.cosine_similarity(fused[name].flatten(), grad.flatten(), dim=0)
        assert likeness > 0.999, f"{name}: {likeness:.5f}"
        assert fused[name].norm() == pytest.approx(grad.norm().item(), rel=0.01), name


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_the_optimizer_is_one_kernel_over_many_weights(backend, build):
    model = build(backend, "bf16")
    optimizer = optimizer_of(model, "bf16", lr=1e-4)
    settings = BackwardSettings()
    train_step(model, optimizer, batch(), layout_alone(), settings=settings, step=1)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        optimizer.step_with_ready_grads()
        torch.cuda.synchronize()
    names = {event.key.lower() for event in seen.key_averages()}
    assert any("fused_adam" in name or "adam" in name and "multi_tensor" in name for name in names), sorted(names)


def test_a_full_memory_is_explained_with_plan_measurement_and_the_first_knob(tmp_path):
    from comet_megatron.testing.runs import run_command, write_config, write_data, write_start

    process = ProcessRank(0, 1, 0, 1)
    write_start(process, tmp_path / "start", ARCHITECTURE, MEMORY, precision="bf16")
    write_data(tmp_path / "data", [text(20_000, seed=0), text(20_000, seed=1)])  # 157 chunks, all of them kept
    config = write_config(tmp_path / "run.yaml", tmp_path, model={"precision": "bf16"}, train={"global_batch_size": 1})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    # Enough for the model and its optimizer, not for the activations of all chunks.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
    try:
        code, _, message = run_command(process, "--config", str(config))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 2, message
    for part in ("out of memory", "planned, in GiB", "train.recompute=full"):
        assert part in message, message
    assert "Traceback" not in message
