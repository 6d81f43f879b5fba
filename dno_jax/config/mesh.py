"""How devices are laid out."""

from __future__ import annotations

from pydantic import Field, model_validator

from dno_jax.config.base import ROUNDS, Section


class MeshSection(Section):
    """Devices by mesh axis; one axis may be -1 and takes the rest.

    data and fsdp split rows; fsdp splits weights too, tensor heads and widths. expert splits a model's experts, and
    rows as data does: for a model without experts it is the same as data.
    """

    data: int = Field(
        default=-1,
        description="devices along it; -1: all that are left; rows are split over it",
        json_schema_extra=ROUNDS,
    )
    fsdp: int = Field(default=1, description="weights and rows are split over it", json_schema_extra=ROUNDS)
    expert: int = Field(default=1, description="experts are split over it", json_schema_extra=ROUNDS)
    tensor: int = Field(default=1, description="heads and MLPs are split over it", json_schema_extra=ROUNDS)
    dcn_data: int = Field(
        default=-1,
        description="slices of devices that only a data centre's network joins; data is split over them first, and no "
        "other axis; -1: those that TPUs say they are in, one elsewhere",
        json_schema_extra=ROUNDS,
    )

    @model_validator(mode="after")
    def _axes(self) -> MeshSection:
        sizes = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert, "tensor": self.tensor}
        if self.dcn_data < 1 and self.dcn_data != -1:
            raise ValueError(f"dcn_data is {self.dcn_data}; expected a positive number of slices, or -1")
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name} is {size}; expected a positive number of devices, or -1 for the rest")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("more than one axis is -1; only one can take the rest")
        return self
