"""Settings of quantization. Importing them imports no framework, so that forms and pipelines open at once."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workbench.config import Config, hint
from workbench.registry import Registry

OBSERVERS = Registry(
    "observer",
    {
        "auto": "workbench.compress.observers:least_squares",
        "minmax": "workbench.compress.observers:minmax",
        "moving_average": "workbench.compress.observers:moving_average",
        "percentile": "workbench.compress.observers:percentile",
        "histogram": "workbench.compress.observers:least_squares",
        "entropy": "workbench.compress.observers:least_divergence",
    },
)
"""How a range is taken from calibration samples, by name: a function from what was seen and the config to (lowest, highest)."""

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("static", "dynamic", "qat", "weight_only"),
    "onnxruntime": ("static", "dynamic"),
    "openvino": ("static", "weight_only"),
    "xnnpack": ("static",),
    "cuda": ("static", "dynamic", "weight_only", "fp8"),
}
"""What runs a quantized model, and the modes that it has kernels for; ``cpu`` is Inductor's own."""


class QuantConfig(Config):
    """How a model's numbers are stored and multiplied in 8 bits, or stored in 4."""

    kind: ClassVar[str] = "quantize"

    mode: Literal["static", "dynamic", "qat", "weight_only", "fp8"] = Field(
        "static",
        description="static: activation ranges come from calibration samples (convolutions and linear layers); dynamic: they are "
        "measured at each call (linear layers, LSTMs); qat: weights and ranges are learned by fine-tuning; weight_only: only "
        "storage shrinks; fp8: 8-bit floating point, on GPUs that have it, with ranges from samples if there are any. On GPUs, "
        "only linear layers are quantized.",
    )
    backend: Literal["cpu", "onnxruntime", "openvino", "xnnpack", "cuda"] = Field(
        "cpu", description="What will run the model: cpu is Inductor; onnxruntime, openvino and xnnpack (phones) are extras."
    )
    activation_bit: Literal[7, 8] = Field(
        8, description="Bits of an activation; 7 avoids saturated sums on CPUs without VNNI or AMX instructions."
    )
    weight_bit: Literal[4, 8] = Field(8, description="Bits of a weight; 4 is for mode='weight_only' on GPUs.")
    quant_scheme: Literal["affine", "symmetric"] = Field(
        "affine",
        description="Of activations: affine fits lowest and highest value; symmetric keeps zero in the middle where values can "
        "be negative, and at the bottom where they can't. Weights are always symmetric, as the kernels expect.",
    )
    granularity: Literal["auto", "channel", "tensor"] = Field(
        "auto",
        description="One scale for each output channel of a weight, or one for the whole weight; auto: for each channel, but in "
        "fp8, where it is no more exact and GPUs multiply more slowly, for the whole.",
    )
    observer: str = Field(
        "auto",
        description="How an activation's range is taken (static): minmax, a moving_average of it over batches, a percentile, or "
        "the range of least squared error (histogram) or least divergence (entropy); auto is histogram, minmax for fp8, and on "
        "other backends what they prefer.",
        json_schema_extra=hint(choices="observers"),
    )
    percentile: float = Field(
        99.99,
        gt=50,
        le=100,
        description="Percentage of values that the range covers at either end (observer='percentile').",
        json_schema_extra=hint(advanced=True),
    )
    calibration_samples: int = Field(
        256, ge=1, description="Samples, at most, from which activation ranges are taken (static, fp8)."
    )
    equalize: bool = Field(
        True,
        description="Bring the channels that a depthwise convolution reads to one range before they are rounded, where they "
        "differ so much that small ones would drown (static).",
        json_schema_extra=hint(advanced=True),
    )
    correct_bias: bool = Field(
        True,
        description="Move biases so that rounding leaves each layer's mean output where it was on calibration samples (static).",
        json_schema_extra=hint(advanced=True),
    )
    keep_float: list[str] = Field(
        default_factory=list, description="Layers left in floating point, as names or patterns, e.g. 'stem*' or '*.se.*'."
    )
    embedding_bit: Literal[8, 32] = Field(
        8,
        description="Bits of an embedding's numbers (dynamic, weight_only): 8 stores each row as integers with one scale.",
        json_schema_extra=hint(advanced=True),
    )

    @property
    def by_channel(self) -> bool:
        """Whether each output channel of a weight has a scale of its own."""
        return self.granularity == "channel" or (self.granularity == "auto" and self.mode != "fp8")

    @field_validator("observer")
    @classmethod
    def _known(cls, name: str) -> str:
        return OBSERVERS.check(name)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.mode not in BACKENDS[self.backend]:
            able = [name for name, modes in BACKENDS.items() if self.mode in modes]
            raise ValueError(
                f"backend={self.backend!r} has no mode={self.mode!r}: it has {', '.join(BACKENDS[self.backend])}; "
                f"{self.mode} runs on {' or '.join(able)}"
            )
        if self.activation_bit != 8 and (self.mode not in ("static", "qat") or self.backend != "cpu"):
            raise ValueError(
                f"activation_bit={self.activation_bit} is for mode='static' or 'qat' with backend='cpu'; "
                f"activations of mode={self.mode!r} with backend={self.backend!r} have 8 bits"
            )
        if self.weight_bit == 4 and (self.mode, self.backend) != ("weight_only", "cuda"):
            raise ValueError("weight_bit=4 is for mode='weight_only' with backend='cuda': CPUs here have no 4-bit kernels")
        return self
