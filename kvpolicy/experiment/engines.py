"""Where the units of an experiment run, as it is declared: in this process, or in workers of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvpolicy.words import listed

NAMES = ("local", "ray")
_OF_RAY = ("address", "gpus")


class Engine(BaseModel):
    """Worker processes. Rows don't depend on them, so a run may go on with another engine, or with none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Literal["local", "ray"] = Field(description="Processes of this machine, or actors of a Ray cluster.")
    workers: int | None = Field(
        default=None, ge=1, le=4096, description="Workers; by default one for each device, or as many as Ray has room."
    )
    cpus: int = Field(
        default=1, ge=1, le=4096, description="CPUs of a worker: threads of torch where it runs on the CPU."
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=4096,
        description="GPUs that Ray gives a worker; by default 1 where the device is cuda.",
    )
    address: str | None = Field(
        default=None, min_length=1, description="Of a Ray cluster, HOST:PORT; by default RAY_ADDRESS, as Ray has it."
    )

    @model_validator(mode="after")
    def _check(self) -> Engine:
        wrong = [key for key in _OF_RAY if self.name != "ray" and getattr(self, key) is not None]
        if wrong:
            raise ValueError(f"{wrong[0]} is of the engine ray, found it with {self.name}; leave it out")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"address must be HOST:PORT of a node of the cluster, found {self.address}: Ray's client can't stream "
                "rows; run the command on a node, or as a job (ray job submit)"
            )
        return self


def _word(value: Any) -> Any:
    """A word stands for a mapping of one key."""
    if isinstance(value, str) and value not in NAMES:
        raise ValueError(f"engine must be one of {listed(NAMES)}, found {value!r}")
    return {"name": value} if isinstance(value, str) else value


Given = Annotated[
    Engine | None, BeforeValidator(_word), Field(description="Workers that run it; by default this process does.")
]
