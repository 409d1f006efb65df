"""Strided convolutions on a waveform and a recurrent context, each a module (paper, section 4.2 and appendix A.2).

Between modules a sample is `(C, T)`: T frames in time. The paper's five convolutions turn 20,480 samples into 4095,
1023, 512, 257 and 128 frames (its Table 5 prints the last kernel as 1; these counts, and the published code, say 4).

Letters: B batch, C channels, T frames, S samples of a waveform, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from operator import mul

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise import optional
from layerwise.errors import RecipeError
from layerwise.nets.convolution import Convolution1d
from layerwise.nets.module import Encoded, Module
from layerwise.nets.settings import NetworkSettings
from layerwise.settings.base import MOST_CHANNELS, MOST_LAYERS, JsonValue, Settings, Shape

MOST_FRAMES = 2**16
"""That a layer reads at once."""


class Convolution(Settings):
    """One layer, which is one module."""

    kernel: int = Field(ge=1, le=MOST_FRAMES, description="frames read by each output frame")
    stride: int = Field(1, ge=1, le=MOST_FRAMES, description="frames between neighbouring output frames")
    padding: int = Field(0, ge=0, le=MOST_FRAMES, description="zero frames added at either end")

    def frames(self, frames: int) -> int:
        """Output frames for so many input frames; below 1 where the input is too short."""
        return (frames + 2 * self.padding - self.kernel) // self.stride + 1


class GRUContext(Settings):
    """A recurrent context as the last module."""

    hidden: int = Field(256, ge=1, le=MOST_CHANNELS, description="units of the state, which is the representation")
    bptt: bool = Field(True, description="false: no gradient from a step to the steps before it (paper, Table 4)")


LABEL_HOP, LABEL_SPAN = 160, 400  # samples: phones are labelled a hundred times a second, each from 25 ms
PAPER_LAYERS = (
    Convolution(kernel=10, stride=5, padding=2),
    Convolution(kernel=8, stride=4, padding=2),
    Convolution(kernel=4, stride=2, padding=2),
    Convolution(kernel=4, stride=2, padding=2),
    Convolution(kernel=4, stride=2, padding=1),
)


class SpeechEncoder(NetworkSettings):
    """One module for each convolution, and one for the context."""

    channels: int = Field(512, ge=1, le=MOST_CHANNELS, description="channels of every convolution")
    layers: tuple[Convolution, ...] = Field(
        PAPER_LAYERS, min_length=1, max_length=MOST_LAYERS, description="convolutions, each a module"
    )
    context: GRUContext | None = Field(
        GRUContext(),
        description="recurrent last module; null: the last convolution is the last module (paper, Table 4)",
    )

    @property
    def has_context(self) -> bool:
        return self.context is not None

    def frames(self, samples: int) -> list[int]:
        """T after each convolution."""
        return list(accumulate(self.layers, lambda frames, layer: layer.frames(frames), initial=samples))[1:]

    def modules(self, sample_shape: Shape) -> list[Module]:
        if len(sample_shape) != 2 or sample_shape[0] != 1:
            raise RecipeError(
                f"SpeechEncoder reads waveforms (1, samples); the dataset gives samples of shape {sample_shape}"
            )
        if min(self.frames(sample_shape[1])) < 1:
            raise RecipeError(
                f"the convolutions turn the dataset's windows of {sample_shape[1]} samples into "
                f"{self.frames(sample_shape[1])} frames: "
                "take longer windows (dataset.window), or fewer or smaller layers"
            )
        hops = list(accumulate((layer.stride for layer in self.layers), mul))
        # Of a recording as long as one label, what does not belong to the label lies before it: that is where the
        # convolutions have most of their padding. Longer recordings may have some at the end, by their length.
        fronts = [max(frames - LABEL_HOP // hop, 0) for frames, hop in zip(self.frames(LABEL_SPAN), hops, strict=True)]
        widths = [1] + [self.channels] * len(self.layers)
        modules: list[Module] = [
            ConvolutionModule(inputs, outputs, layer, hop, front)
            for inputs, outputs, layer, hop, front in zip(widths, widths[1:], self.layers, hops, fronts, strict=False)
        ]
        if self.context is not None:
            modules.append(GRUModule(self.channels, self.context.hidden, self.context.bptt, hops[-1], fronts[-1]))
        return modules

    def scaled(self, scale: float) -> SpeechEncoder:
        """Channels times the root of `scale`, since the work of a convolution grows with their square."""
        context = self.context
        if context is not None:
            context = context.model_copy(update={"hidden": max(8, round(context.hidden * math.sqrt(scale)))})
        channels = max(8, round(self.channels * math.sqrt(scale)))
        return self.model_copy(update={"channels": channels, "context": context})

    def identity_through(self, number: int) -> dict[str, JsonValue]:
        context = self.context if number > len(self.layers) else None
        return {
            "kind": type(self).__name__,
            "channels": self.channels,
            "layers": [layer.identity() for layer in self.layers[:number]],
            "context": None if context is None else context.identity(),
        }

    def fixed_features(self) -> dict[str, Callable[[], Module]]:
        return {"mfcc": MFCC}


class ConvolutionModule(Module):
    """A convolution and a ReLU."""

    def __init__(self, inputs: int, outputs: int, layer: Convolution, hop: int, front: int | None = None) -> None:
        super().__init__()
        self.convolution = Convolution1d(inputs, outputs, layer.kernel, layer.stride, layer.padding)
        self.channels = self.target_channels = outputs
        self.hop, self.front = hop, front

    def forward(self, x: Tensor) -> Encoded:
        """(B, C, T) to z = c = output: (B, C', T')."""
        y = F.relu(self.convolution(x))
        return Encoded(y, y, y)


class GRUModule(Module):
    """A gated recurrent unit (Cho et al. 2014) whose state, zero at first, is the context that predicts its inputs."""

    def __init__(self, inputs: int, hidden: int, bptt: bool, hop: int, front: int | None = None) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True)
        self.bptt = bptt
        self.channels, self.target_channels = hidden, inputs
        self.hop, self.front = hop, front

    def forward(self, x: Tensor) -> Encoded:
        """(B, C, T) to z: the input, c = output: (B, H, T)."""
        steps = x.transpose(1, 2).contiguous()
        states = self.gru(steps)[0] if self.bptt else steps_without_bptt(self.gru, steps)
        c = states.transpose(1, 2)
        return Encoded(x, c, c)


def steps_without_bptt(gru: nn.GRU, x: Tensor) -> Tensor:
    """(B, T, C) to states (B, T, H): the ordinary states, with the state before each step taken as a constant.

    Equals a GRU cell stepped by hand with the state detached at each step, at less cost: the steps are made without a
    graph, and one step for all (b, t) at once, each from the known state before it, carries the gradient.
    """
    if not torch.is_grad_enabled():
        return gru(x)[0]  # type: ignore[no-any-return]
    weight_input, weight_state, bias_input, bias_state = gru.all_weights[0]
    inputs = F.linear(x, weight_input, bias_input)  # (B, T, 3 H)
    with torch.no_grad():
        before = [inputs.new_zeros(x.shape[0], gru.hidden_size)]
        for step in inputs.unbind(1)[:-1]:
            before.append(gru_step(step, F.linear(before[-1], weight_state, bias_state), before[-1]))
        known = torch.stack(before, 1)
    return gru_step(inputs, F.linear(known, weight_state, bias_state), known)


def gru_step(inputs: Tensor, recurrent: Tensor, before: Tensor) -> Tensor:
    """The next states (..., H), from what the inputs and the states before give to the gates, each (..., 3 H)."""
    hidden = before.shape[-1]
    gates = torch.sigmoid(inputs[..., : 2 * hidden] + recurrent[..., : 2 * hidden])
    reset, keep = gates.chunk(2, -1)
    proposed = torch.tanh(torch.addcmul(inputs[..., 2 * hidden :], reset, recurrent[..., 2 * hidden :]))
    return torch.lerp(proposed, before.to(proposed.dtype), keep)


def at_labels(c: Tensor, hop: int | None, labels: int, front: int | None = None) -> Tensor:
    """Frames (B, C, T) to one for each of `labels` labels (B, C, L), a label being LABEL_HOP samples.

    There are more frames than labels: `front` of them come before the first label, and by the recording's length a few
    after the last, or none. Without `front`, all come before. The frames that share a label are averaged.
    """
    if hop is None or LABEL_HOP % hop:
        raise RecipeError(
            f"labels come every {LABEL_HOP} samples and the module's frames every {hop}: "
            f"choose strides whose product divides {LABEL_HOP}"
        )
    share = LABEL_HOP // hop
    more = c.shape[2] - labels * share
    if more < 0:
        raise RecipeError(
            f"{labels} labels of {share} frames each need {labels * share} frames, and the module gives {c.shape[2]}: "
            "add padding to its convolutions"
        )
    begin = more if front is None else min(front, more)
    labelled = c[:, :, begin : begin + labels * share]
    return labelled.reshape(*labelled.shape[:2], labels, share).mean(3)


class MFCC(Module):
    """Mel-frequency cepstral coefficients with their first and second differences: fixed features to compare with."""

    COEFFICIENTS = 13
    RATE, WINDOW, HOP, BANDS = 16_000, 400, 160, 40  # Hz, samples, samples, mel bands

    def __init__(self) -> None:
        super().__init__()
        self.channels = self.target_channels = 3 * self.COEFFICIENTS
        self.hop = self.HOP
        transforms = optional.torchaudio("MFCC features").transforms
        spectrum = {
            "n_fft": self.WINDOW,
            "win_length": self.WINDOW,
            "hop_length": self.HOP,
            "n_mels": self.BANDS,
            "center": False,
        }
        self.cepstrum: nn.Module = transforms.MFCC(self.RATE, self.COEFFICIENTS, log_mels=True, melkwargs=spectrum)
        self.differences: nn.Module = transforms.ComputeDeltas()

    def forward(self, x: Tensor) -> Encoded:
        """Waveforms (B, 1, S) to z = c = output: (B, 39, (S - 400) // 160 + 1)."""
        cepstrum = self.cepstrum(x.squeeze(1))
        first = self.differences(cepstrum)
        y = torch.cat([cepstrum, first, self.differences(first)], 1)
        return Encoded(y, y, y)
