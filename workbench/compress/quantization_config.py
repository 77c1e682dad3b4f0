"""Settings of quantization. Importing them imports no framework, so that forms and pipelines open at once."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from workbench.config import Config


class QuantConfig(Config):
    """How a model's numbers are stored and multiplied in INT8."""

    kind: ClassVar[str] = "quantize"

    mode: Literal["static", "dynamic", "qat"] = Field(
        "static",
        description="static: activation ranges come from calibration samples (convolutions and linear layers); dynamic: they are "
        "measured at each call (linear layers); qat: ranges and weights are learned by fine-tuning.",
    )
    activation_bit: Literal[7, 8] = Field(
        8, description="Bits of an activation; 7 avoids saturated sums on CPUs without VNNI or AMX instructions."
    )
    weight_bit: Literal[8] = Field(8, description="Bits of a weight.")
    quant_scheme: Literal["symmetric"] = Field(
        "symmetric",
        description="Weights: zero is stored as 0, one scale an output channel. Activations always have a zero point where they "
        "can be negative, as the CPU's INT8 kernels expect.",
    )
    calibration_samples: int = Field(256, ge=1, description="Samples, at most, from which activation ranges are taken (static).")

    @model_validator(mode="after")
    def _bits_fit_the_mode(self) -> Self:
        if self.mode == "dynamic" and self.activation_bit != 8:
            raise ValueError(f"activation_bit={self.activation_bit} is for mode='static'; dynamic activations have 8 bits")
        return self
