"""The paper's speech network: frame and parameter counts by hand, and the GRU without back-propagation through time."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from layerwise.errors import NotReady, RecipeError
from layerwise.nets.speech import MFCC, Convolution, GRUContext, GRUModule, SpeechEncoder, at_labels, steps_without_bptt

PAPER = SpeechEncoder()


def test_the_papers_frames():
    """Section A.2 and the published code: 4095, 1023, 512, 257, 128 frames of 20,480 samples."""
    assert PAPER.frames(20_480) == [4095, 1023, 512, 257, 128]
    x, found = torch.zeros(1, 1, 20_480), []
    with torch.no_grad():
        for module in SpeechEncoder(channels=3, context=GRUContext(hidden=5)).modules((1, 20_480)):
            z, c, x = module(x)
            found.append((tuple(z.shape[1:]), tuple(c.shape[1:])))
            assert x is c
    assert found[:5] == [((3, frames), (3, frames)) for frames in (4095, 1023, 512, 257, 128)]
    assert found[5] == ((3, 128), (5, 128))


def test_the_papers_parameters():
    with torch.device("meta"):
        modules = PAPER.modules((1, 20_480))
    counts = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    convolutions = [512 * 1 * 10 + 512, 512 * 512 * 8 + 512, *[512 * 512 * 4 + 512] * 3]
    assert counts == [*convolutions, 3 * (256 * 512 + 256 * 256 + 2 * 256)]


def test_representations_are_rectified_and_isolated():
    x = torch.randn(2, 1, 4000, requires_grad=True)
    first, *_ = SpeechEncoder(channels=8).modules((1, 4000))
    z, c, output = first(x)
    assert z is c is output
    assert z.min() == 0


def test_no_context_is_one_module_less_and_the_others_stay_as_they_are():
    with_context, without = PAPER.model_copy(update={"channels": 4}), SpeechEncoder(channels=4, context=None)
    torch.manual_seed(3)
    six = with_context.modules((1, 20_480))
    torch.manual_seed(3)
    five = without.modules((1, 20_480))
    assert (len(six), len(five)) == (6, 5)
    for one, other in zip(six, five, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for number in range(1, 6):
        assert with_context.identity_through(number) == without.identity_through(number)
    other_context = with_context.model_copy(update={"context": GRUContext(bptt=False)})
    assert with_context.identity_through(5) == other_context.identity_through(5)
    assert with_context.identity_through(6) != other_context.identity_through(6)


def test_a_window_too_short_is_one_clear_error():
    with pytest.raises(RecipeError, match=r"windows of 100 samples into \[19, .*\] frames: take longer windows"):
        SpeechEncoder(layers=(Convolution(kernel=10, stride=5), Convolution(kernel=20))).modules((1, 100))


def stepped(gru, x):
    """The definition: a cell stepped by hand, its state detached at each step."""
    cell = nn.GRUCell(gru.input_size, gru.hidden_size, dtype=x.dtype)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in gru.state_dict().items()})
    state, states = x.new_zeros(x.shape[0], gru.hidden_size), []
    for step in x.unbind(1):
        state = cell(step, state.detach())
        states.append(state)
    return torch.stack(states, 1), cell


@pytest.mark.parametrize(("batch", "steps"), [(3, 17), (1, 1), (2, 128)])
def test_the_gru_without_bptt_equals_its_definition(batch, steps):
    torch.manual_seed(0)
    gru = nn.GRU(6, 5, batch_first=True, dtype=torch.float64)
    x, weight = (torch.randn(batch, steps, size, dtype=torch.float64) for size in (6, 5))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    found = steps_without_bptt(gru, mine)
    torch.testing.assert_close(found, gru(x)[0], rtol=1e-12, atol=1e-12)  # the same states as the ordinary unit
    (found * weight).sum().backward()
    expected, cell = stepped(gru, theirs)
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(gru.get_parameter(f"{name}_l0").grad, parameter.grad, rtol=1e-11, atol=1e-12)


def test_the_two_kinds_of_gru_differ_in_gradients_alone():
    torch.manual_seed(0)
    ordinary, cut = (GRUModule(4, 3, bptt, hop=160) for bptt in (True, False))
    cut.load_state_dict(ordinary.state_dict())
    x = torch.randn(2, 4, 9)
    outputs = [module(x).c for module in (ordinary, cut)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output[:, :, -1].sum().backward()
    assert not torch.allclose(ordinary.gru.weight_hh_l0.grad, cut.gru.weight_hh_l0.grad)
    assert torch.equal(cut.eval()(x).c.detach(), cut(x).c.detach())


def test_frames_are_trimmed_from_the_front_and_averaged_to_labels():
    c = torch.arange(10.0).view(1, 1, 10)
    assert at_labels(c, 160, 8).tolist() == [[[2, 3, 4, 5, 6, 7, 8, 9]]]
    assert at_labels(c, 40, 2).tolist() == [[[3.5, 7.5]]]
    with pytest.raises(RecipeError, match="11 labels of 1 frames each need 11 frames, and the module gives 10"):
        at_labels(c, 160, 11)
    with pytest.raises(RecipeError, match="every 160 samples and the module's frames every 100"):
        at_labels(c, 100, 2)


def test_a_label_has_the_same_frames_however_long_the_recording_is():
    """A recording of a few samples more may have a frame more and no label more: the frame comes behind."""
    encoder = SpeechEncoder(channels=2, context=GRUContext(hidden=2))
    for module, counted in zip(encoder.modules((1, 20_480)), [*range(5), 4], strict=True):
        found = []
        for samples in range(16_000, 16_160, 13):
            frames, labels = encoder.frames(samples)[counted], (samples - 400) // 160 + 1
            c = torch.arange(float(frames)).view(1, 1, -1)
            found.append(at_labels(c, module.hop, labels, module.front)[0, 0, :97])
        assert all(torch.equal(one, found[0]) for one in found)


def test_every_module_has_frames_enough_for_the_labels_of_any_length():
    for samples in [1600, 1601, 1759, 1760, 1799, 20_480, 33_333]:
        labels = (samples - 400) // 160 + 1
        hop = 1
        for layer, frames in zip(PAPER.layers, PAPER.frames(samples), strict=True):
            hop *= layer.stride
            assert frames >= labels * (160 // hop), (samples, hop)


def test_mfcc_have_a_frame_for_each_label_and_loudness_only_moves_the_first():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 20_480)
    features = MFCC()
    soft, loud = features(x).c, features(10 * x).c
    assert soft.shape == (1, 39, 126)
    torch.testing.assert_close(soft[:, 1:13], loud[:, 1:13], rtol=1e-3, atol=1e-3)
    assert (loud[:, 0] - soft[:, 0]).min() > 1
    torch.testing.assert_close(soft[:, 13:], loud[:, 13:], rtol=1e-3, atol=1e-3)


def test_a_torchaudio_that_cannot_be_imported_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(NotReady, match="MFCC features need torchaudio, which cannot be imported here"):
        MFCC()
