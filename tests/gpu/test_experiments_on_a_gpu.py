"""Training of experiments on a GPU: recorded steps, resuming, batches made there, and the convolutions behind them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from anymamba.data.synthetic.copying import Copying, copying_batch
from anymamba.data.synthetic.induction import induction_batch
from anymamba.data.synthetic.recall import Recall, recall_batch
from anymamba.experiments import speed
from anymamba.experiments.scaling.arms import ARCHITECTURES, Size, config_of
from anymamba.experiments.speed import arms as speed_arms
from anymamba.experiments.speed import timing, whole_models
from anymamba.kernels.head_products import cuda as cuda_head_products
from anymamba.lab.byte_windows import fixed_windows, random_windows
from anymamba.lab.experiment import Context
from anymamba.lab.language import optimization
from anymamba.lab.learning import batch_generator, build_model, learn
from anymamba.lab.optimization import TrainingStep
from anymamba.lab.saving import OutOfTime, Saving
from anymamba.layers.h3 import H3
from anymamba.layers.hyena import Hyena
from anymamba.layers.s4 import S4
from anymamba.layers.s4d import S4D
from anymamba.models.language_model import LanguageModel
from anymamba.parts import head_products, toeplitz
from anymamba.parts.fft_conv import fft_conv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
SMALL = Size("small", 4, 128, 0, 0)


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(256, (n, 4, 257), generator=torch.Generator().manual_seed(0)).cuda()
    return [(r[:, :-1], r[:, 1:]) for r in rows]


def trained(name: str, plain: bool) -> tuple[list[float], list[torch.Tensor], str | None]:
    """Ten steps: losses, weights, and why they were not recorded."""
    torch.manual_seed(0)
    model = LanguageModel(config_of(name, SMALL, 256)).cuda()
    take = TrainingStep(model, optimization(10, 4, 2e-3, "bfloat16"))
    take.not_recorded = "asked for" if plain else None
    losses = [take(batch, i + 1) for i, batch in enumerate(batches(10))]
    return torch.stack(losses).tolist(), list(model.parameters()), take.not_recorded


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_steps_are_plain_ones(name):
    (losses, weights, why), (plain, same, _) = trained(name, False), trained(name, True)
    assert why is None
    assert losses == pytest.approx(plain, rel=1e-3)
    for a, b in zip(weights, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_recorded_steps_of_several_shapes_are_plain_ones():
    def run(plain: bool) -> tuple[list[float], str | None]:
        torch.manual_seed(0)
        take = TrainingStep(LanguageModel(config_of("mamba", SMALL, 256)).cuda(), optimization(16, 4, 2e-3, "float32"))
        take.not_recorded = "asked for" if plain else None
        shapes, losses = ((4, 256, None), (2, 128, None), (2, 128, 128)), []
        for i, (ids, labels) in enumerate(batches(16)):
            rows, length, labels_a_row = shapes[i % 3]
            losses.append(take((ids[:rows, :length], labels[:rows, :length]), i + 1, labels_a_row))
        assert plain or len(take._recorded) == 3
        return torch.stack(losses).tolist(), take.not_recorded

    (losses, why), (plain, _) = run(False), run(True)
    assert why is None and losses == pytest.approx(plain, rel=1e-3)


def test_a_recorded_step_follows_the_schedule():
    model = LanguageModel(config_of("mamba", SMALL, 256)).cuda()
    take = TrainingStep(model, replace(optimization(10, 4, 1e-3, "float32"), warmup_steps=0, final_rate=0.0))
    for i, batch in enumerate(batches(10)):
        before = model.norm.weight.detach().clone()
        take(batch, i + 1)
        moved = (model.norm.weight - before).abs().max().item()
    assert moved == 0.0, "the last rate of the cosine is 0"


def test_a_training_goes_on_from_its_file(tmp_path):
    text = torch.randint(256, (5000,), dtype=torch.uint8).cuda()
    how, on = optimization(60, 4, 2e-3, "bfloat16"), Context(torch.device("cuda"), 0, lambda *told: None)

    def run(saving: Saving | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(config_of("mamba", SMALL, 64), on)
        validation = fixed_windows(text, 64, 4)
        learn(model, how, random_windows(text, 64), validation, replace(on, saving=saving), every=30, resumable=True)
        return list(model.parameters())

    straight = run(None)
    with pytest.raises(OutOfTime):
        run(Saving(tmp_path / "arm", {}, deadline=0.0))  # after the 20th step
    resumed = run(Saving(tmp_path / "arm", {}))
    for a, b in zip(straight, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_batches_are_made_on_the_gpu():
    generator = batch_generator(Context(torch.device("cuda"), 0, lambda *told: None))
    for ids, labels in (
        copying_batch(Copying(20, 4), generator, 8),
        recall_batch(Recall(4, 32, 64), generator, 8),
        induction_batch(generator, 8, 20),
    ):
        assert ids.is_cuda and labels.is_cuda and (labels != -100).any()


@pytest.mark.parametrize(("rows", "length", "width"), [(64, 1024, 8), (32, 500, 3), (128, 2048, 4)])
def test_products_of_many_rows_are_the_convolution(rows, length, width):
    torch.manual_seed(0)
    assert toeplitz.is_faster("cuda", torch.bfloat16, rows, length)
    u = torch.randn(rows, length, width, device="cuda").bfloat16().requires_grad_()
    kernel = (torch.randn(width, length, device="cuda") * length**-0.5).requires_grad_()
    dy = torch.randn(rows, length, width, device="cuda")
    exact = fft_conv(u.double(), kernel.double())
    wanted = (exact, *torch.autograd.grad(exact, (u, kernel), dy.double()))
    y = fft_conv(u, kernel)
    for got, want in zip((y, *torch.autograd.grad(y, (u, kernel), dy.bfloat16())), wanted, strict=True):
        assert (got.double() - want.double()).norm() <= 2**-6 * want.double().norm()


def test_h3_by_products_is_h3():
    """In bfloat16 heads and shift are products; in float64 they are transforms and one product for each tap."""
    torch.manual_seed(0)
    layer = H3(64, S4D(8, 16), d_head=8, d_shift=64).cuda()
    x, dy = torch.randn(2, 4, 300, 64, device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = copy.deepcopy(layer).to(dtype)
        u = x.to(dtype).requires_grad_()
        y, _ = own(u)
        found.append((y, *torch.autograd.grad(y, (u, own.shift.C, own.inner.kernel.C), dy.to(dtype))))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() <= 2**-5 * want.norm()


@pytest.mark.parametrize("name", ["h3", "hyena", "s4d", "s4"])
def test_layers_compile_into_one_graph(name):
    """With gradients; torch.compile sees operations in place of kernels that are not registered."""
    torch.manual_seed(0)
    build = {
        "h3": lambda: H3(64, S4D(8, 16), d_head=8),
        "hyena": lambda: Hyena(64, max_length=300),
        "s4d": lambda: S4D(64, 16),
        "s4": lambda: S4(64, 16),
    }
    layer = build[name]().cuda()
    x, dy = torch.randn(2, 8, 300, 64, device="cuda")
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)[0]
        found.append((y, *torch.autograd.grad(y, [p for p in layer.parameters() if p.requires_grad], dy.to(y.dtype))))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want.double()).norm() <= 2**-4 * want.double().norm()


@pytest.mark.parametrize("dtype", cuda_head_products.DTYPES, ids=str)
def test_head_products_in_a_kernel_are_those_of_torch(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 300, 6, 16, device="cuda").to(dtype)[..., :8]
    dy = torch.randn(5, 300, 6, 8, device="cuda").to(dtype)
    found = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t).requires_grad_() for t in (q, k, v)]
        assert cuda_head_products.serves(leaves[0]) != wide
        y = head_products.contract(leaves[0], head_products.outer(*leaves[1:]))
        found.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "width"),
    [(3, 100, 5), (16, 2048, 24), (20, 2048, 24), (8, 3000, 50), (24, 700, 18), (2, 4096, 8), (1, 1, 1)],
)
def test_long_convolutions_in_kernels_are_those_by_cufft(rows, length, width, dtype):
    """By products or FFTs in shared memory, against float64."""
    torch.manual_seed(0)
    u, dy = (torch.randn(rows, length, width, device="cuda").to(dtype) for _ in range(2))
    kernel = torch.randn(width, length, device="cuda")
    found = []
    for wanted in (False, True):
        leaves = [(t.double() if wanted else t.clone()).requires_grad_() for t in (u, kernel)]
        y = fft_conv(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for got, want in zip(*found, strict=True):
        tolerance = 1e-5 if got.dtype == torch.float32 else 1e-2
        assert (got.double() - want).norm() < tolerance * want.norm()


# --------------------------------------------------------------------------------------------------------------- speed

TOY = speed_arms.SCALES["toy"]


@pytest.mark.parametrize(
    "settings", [replace(TOY.operators, length=64), replace(TOY.models, context=32), replace(TOY.batches, batch=2)]
)
def test_what_is_timed_is_recorded(settings):
    values = speed.measure(settings, Context(torch.device("cuda"), 0, lambda *_: None))
    times = values.get("throughput") or values["times"]
    timings = [own for found in times.values() for own in (found.values() if "mamba" in found else [found])]
    ran = [own for own in timings if own["missing"] is None]  # the convolution's blocks are over the toy's memory cap
    assert ran and all(own["recorded"] for own in ran), values


@pytest.mark.parametrize("name", ["mamba", "transformer"])
def test_recorded_tokens_end_in_the_state_of_plain_ones(name):
    model = LanguageModel(getattr(TOY.models, name)).cuda()
    with torch.no_grad():
        prompt = whole_models.prompt_of(model, 12)
        prompt()
        tokens, ends = whole_models.Tokens(prompt, 5), []

        def write(state):
            ends.append(tokens.write(state))

        replay = timing.recorded(write, torch.device("cuda"), tokens.begin)
        assert replay is not None
        for _ in range(3):
            replay()
        plain, replayed = (model.step(tokens.ids[:1], state).logits for state in (ends[0], ends[-1]))
    torch.testing.assert_close(replayed, plain)
